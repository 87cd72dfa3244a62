"""Batch norm over groups of lanes against the formula in float64, in one process and on four ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_shards.errors import UserError
from pipeline.batchnorm import GroupBatchNorm, _AcrossGPUs, average_running_statistics, commit_statistics, convert
from tests.pipeline import distributed

LANES, ROWS, CHANNELS = 4, 6, 5  # rows of a lane: its samples times their views
SHAPES = {"2d": (LANES * ROWS, CHANNELS, 4, 3), "1d": (LANES * ROWS, CHANNELS)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
Result = dict[str, Tensor]


def example(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of all lanes, each lane with a mean and a spread of its own, and the gradient that comes back to them."""
    random = torch.Generator().manual_seed(11)
    rows, gradient = (torch.randn(SHAPES[kind], generator=random, dtype=torch.float64) for _ in range(2))
    lane = torch.arange(len(rows)).div(ROWS, rounding_mode="floor").reshape(-1, *[1] * (rows.dim() - 1))
    rows, gradient = ((1 + lane) * rows + 3 * lane).to(dtype), gradient.to(dtype)
    return (rows.contiguous(memory_format=torch.channels_last), gradient) if kind == "2d" else (rows, gradient)


def plain(kind: str, dtype: torch.dtype) -> nn.BatchNorm1d | nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS) if kind == "2d" else nn.BatchNorm1d(CHANNELS)
    random = torch.Generator().manual_seed(12)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.copy_(torch.rand(CHANNELS, generator=random) + 0.5)
    return norm.to(dtype)


def by_formula(kind: str, group_lanes: int) -> Result:
    """Output, gradients and running statistics of one step, in float64, by autograd through the formula."""
    rows, gradient = example(kind, torch.float64)
    norm = plain(kind, torch.float64)
    rows.requires_grad_()
    channel = (1, CHANNELS, *[1] * (rows.dim() - 2))
    others = [0, *range(2, rows.dim())]
    outputs, means, variances = [], [], []
    for part in rows.split(group_lanes * ROWS):
        mean = part.mean(others, keepdim=True)
        variance = ((part - mean) ** 2).mean(others, keepdim=True)
        scaled = (part - mean) / (variance + 1e-5).sqrt()
        outputs.append(scaled * norm.weight.reshape(channel) + norm.bias.reshape(channel))
        count = part.numel() / CHANNELS
        means.append(mean.flatten())
        variances.append(variance.flatten() * count / (count - 1))
    output = torch.cat(outputs)
    output.backward(gradient)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return {
        "output": output.detach(),
        "rows": rows.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "running_mean": 0.9 * norm.running_mean + 0.1 * torch.stack(means).mean(0).detach(),
        "running_var": 0.9 * norm.running_var + 0.1 * torch.stack(variances).mean(0).detach(),
    }


def by_groups(kind: str, dtype: torch.dtype, group_lanes: int, rank: int, world_size: int) -> Result:
    """The same by the module, on the rows of one rank."""
    rows, gradient = (tensor.chunk(world_size)[rank].clone() for tensor in example(kind, dtype))
    rows.requires_grad_()
    norm = convert(plain(kind, dtype), LANES // world_size, rank, world_size, group_lanes)
    output = norm(rows)
    output.backward(gradient)
    commit_statistics(norm, keep=True)
    average_running_statistics(norm)
    grads = {"rows": rows.grad, "weight": norm.get_parameter("weight").grad, "bias": norm.get_parameter("bias").grad}
    running = {name: norm.get_buffer(name) for name in ("running_mean", "running_var")}
    return {"output": output.detach(), **grads, **running}


def assert_same(result: Result, expected: Result, tolerance: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            result[name].double(),
            tensor.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_lanes", [1, 2, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_groups_within_a_rank_follow_the_formula(kind: str, group_lanes: int, dtype: torch.dtype) -> None:
    assert_same(by_groups(kind, dtype, group_lanes, 0, 1), by_formula(kind, group_lanes), TOLERANCE[dtype])


def on_a_rank(rank: int) -> dict[Any, Any]:
    """What the tests below need of four ranks, in one go: starting them takes seconds."""
    results: dict[Any, Any] = {
        (kind, group_lanes, dtype): by_groups(kind, dtype, group_lanes, rank, 4)
        for kind in SHAPES
        for group_lanes in (1, 2, 4)
        for dtype in TOLERANCE
    }
    far = convert(nn.BatchNorm1d(1), 1, rank, 4, 4)
    random = torch.Generator().manual_seed(rank)
    far(3e4 + torch.randn(4000, 1, generator=random))
    commit_statistics(far, keep=True)
    results["variance far from 0"] = far.get_buffer("running_var").item()
    rows, gradient = (tensor.chunk(4)[rank] for tensor in example("2d", torch.bfloat16))
    half = convert(plain("2d", torch.float32), 1, rank, 4, 4)
    rows = rows.clone().requires_grad_()
    half(rows).backward(gradient)
    results["bf16"] = {"rows": rows.grad, "running_var": half.pending[0][1]}
    for what, start in (("equal", 0.1), ("different", 0.1 + rank)):
        norm = convert(nn.BatchNorm1d(1), 1, rank, 4, 1)
        norm.get_buffer("running_mean").fill_(start)
        average_running_statistics(norm)
        results[f"average of {what}"] = norm.get_buffer("running_mean").item()
    results["kernels of a GPU"] = {kind: by_kernels_of_a_gpu(kind, rank) for kind in SHAPES}
    dist.barrier()
    return results


class Kernels:
    """torch's CUDA kernels for batch norm over ranks, by their formulas."""

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x: Tensor, means: Tensor, inverse_stds: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
        eps: float, counts: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total, each = counts.sum(), counts[:, None]
        mean = (means * each).sum(0) / total
        variance = ((inverse_stds**-2 - eps + (means - mean) ** 2) * each).sum(0) / total
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * total / (total - 1), momentum)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, _: float
    ) -> Tensor:
        return ((x.transpose(1, -1) - mean) * inverse_std * weight + bias).transpose(1, -1)

    @staticmethod
    def batch_norm_backward_reduce(
        grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, *_: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope, far = (tensor.transpose(1, -1).flatten(0, -2) for tensor in (grad, x))
        sums = slope.sum(0), (slope * (far - mean)).sum(0)
        return *sums, sums[1] * inverse_std, sums[0]

    @staticmethod
    def batch_norm_backward_elemt(
        grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, slope: Tensor, far: Tensor,
        counts: Tensor,
    ) -> Tensor:  # fmt: skip
        total = counts.sum()
        pulled = (x.transpose(1, -1) - mean) * inverse_std**2 * far / total
        return ((grad.transpose(1, -1) - slope / total - pulled) * inverse_std * weight).transpose(1, -1)


def by_kernels_of_a_gpu(kind: str, rank: int) -> Result:
    """A group of all ranks as on GPUs, of which this machine lacks the kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(Kernels) if name.startswith("batch_norm")]:
            patch.setattr(torch, name, getattr(Kernels, name))
        rows, gradient = (tensor.chunk(4)[rank].clone() for tensor in example(kind, torch.float64))
        rows.requires_grad_()
        norm = plain(kind, torch.float64)
        mean, variance = torch.zeros(2, CHANNELS, dtype=torch.float64)
        output = _AcrossGPUs.apply(rows, norm.weight, norm.bias, mean, variance, 1e-5, 1.0, dist.group.WORLD, 4)
        output.backward(gradient)
    grads = {"rows": rows.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    assert norm.running_mean is not None
    assert norm.running_var is not None
    running = {
        "running_mean": norm.running_mean.lerp(mean, 0.1),
        "running_var": norm.running_var.lerp(variance, 0.1),
    }
    return {"output": output.detach(), **grads, **running}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[Any, Any]]:
    return distributed.run(4, on_a_rank)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_lanes", [1, 2, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_groups_over_several_ranks_give_what_one_process_gives(
    four_ranks: list[dict[Any, Any]], kind: str, group_lanes: int, dtype: torch.dtype
) -> None:
    parts = [results[kind, group_lanes, dtype] for results in four_ranks]
    together = {name: torch.cat([part[name] for part in parts]) for name in ("output", "rows")}
    together |= {name: torch.stack([part[name] for part in parts]).sum(0) for name in ("weight", "bias")}
    for part in parts:
        running = {name: part[name] for name in ("running_mean", "running_var")}
        assert_same(together | running, by_formula(kind, group_lanes), TOLERANCE[dtype])
        assert_same(together | running, by_groups(kind, dtype, group_lanes, 0, 1), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_asked_of_a_gpus_kernels_gives_what_one_process_gives(
    four_ranks: list[dict[Any, Any]], kind: str
) -> None:
    parts = [results["kernels of a GPU"][kind] for results in four_ranks]
    together = {name: torch.cat([part[name] for part in parts]) for name in ("output", "rows")}
    together |= {name: torch.stack([part[name] for part in parts]).sum(0) for name in ("weight", "bias")}
    for part in parts:
        running = {name: part[name] for name in ("running_mean", "running_var")}
        assert_same(together | running, by_formula(kind, 4), 1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_normalises_as_a_cpu_does_and_waits_for_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        norm = GroupBatchNorm(plain("2d", torch.float32), 1, dist.group.WORLD).cuda()
        rows, gradient = (tensor.to("cuda", dtype) for tensor in example("2d", torch.float32))
        rows.requires_grad_()
        norm(rows).backward(gradient)  # NCCL makes its connections
        rows.grad = norm.weight.grad = norm.bias.grad = None
        torch.cuda.set_sync_debug_mode("error")
        output = norm(rows)
        output.backward(gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    grads = {"rows": rows.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    expected = by_formula("2d", LANES)
    found = {name: tensor.detach().cpu() for name, tensor in {"output": output, **grads}.items() if tensor is not None}
    near = 2e-5 if dtype == torch.float32 else 0.1
    assert_same(found, {name: expected[name] for name in found}, near)


@pytest.mark.slow
def test_activations_in_bf16_are_normalised_over_ranks_by_statistics_in_fp32(
    four_ranks: list[dict[Any, Any]],
) -> None:
    exact = by_groups("2d", torch.float32, 4, 0, 1)
    together = torch.cat([results["bf16"]["rows"] for results in four_ranks])
    assert together.dtype == torch.bfloat16
    torch.testing.assert_close(together.float(), exact["rows"], rtol=0.02, atol=0.02)
    assert {results["bf16"]["running_var"].dtype for results in four_ranks} == {torch.float32}


@pytest.mark.slow
def test_the_variance_over_ranks_keeps_its_digits_when_the_mean_is_far_from_zero(
    four_ranks: list[dict[Any, Any]],
) -> None:
    batch = [(results["variance far from 0"] - 0.9) / 0.1 for results in four_ranks]  # it started at 1
    assert batch == pytest.approx([1.0] * 4, abs=0.05)


@pytest.mark.slow
def test_averaging_gives_all_ranks_the_mean(four_ranks: list[dict[Any, Any]]) -> None:
    assert [results["average of different"] for results in four_ranks] == pytest.approx([1.6] * 4)


@pytest.mark.slow
def test_averaging_leaves_equal_statistics_as_they_are_to_the_bit(four_ranks: list[dict[Any, Any]]) -> None:
    assert [results["average of equal"] for results in four_ranks] == [torch.tensor(0.1).item()] * 4


def test_running_statistics_move_as_torchs_own_over_several_forwards() -> None:
    torch.manual_seed(1)
    own = plain("2d", torch.float32)
    ours = convert(plain("2d", torch.float32), LANES, 0, 1, LANES)
    for size in (4, 2):
        rows = torch.randn(8, CHANNELS, size, size)
        own(rows)
        ours(rows)
    assert ours.get_buffer("num_batches_tracked") == 0
    commit_statistics(ours, keep=True)
    for name, buffer in own.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    rows = torch.randn(8, CHANNELS, 3, 3)
    torch.testing.assert_close(ours.eval()(rows), own.eval()(rows))


def test_a_dropped_step_leaves_the_buffers_bit_for_bit() -> None:
    norm = convert(plain("1d", torch.float32), LANES, 0, 1, 2)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.full(SHAPES["1d"], float("nan")))
    commit_statistics(norm, keep=False)
    commit_statistics(norm, keep=True)  # nothing is left of the dropped step
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_does_not_count_a_forward_twice(reentrant: bool) -> None:
    own, ours = plain("1d", torch.float32), convert(plain("1d", torch.float32), LANES, 0, 1, LANES)
    rows, _ = example("1d", torch.float32)
    own(rows)
    checkpoint(ours, rows.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    commit_statistics(ours, keep=True)
    assert ours.get_buffer("num_batches_tracked") == 1
    torch.testing.assert_close(ours.get_buffer("running_mean"), own.running_mean)


def test_converting_keeps_names_parameters_and_buffers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)))
    before = net.state_dict(keep_vars=True)
    convert(net, LANES, 0, 1, 2)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert sum(isinstance(module, GroupBatchNorm) for module in net.modules()) == 2


@pytest.mark.parametrize(
    ("lanes", "world_size", "group_lanes"), [(6, 2, 4), (6, 1, 4), (2, 2, 8), (3, 4, 2), (2, 3, 4)]
)
def test_groups_that_ranks_would_cut_apart_are_refused_with_those_that_fit(
    lanes: int, world_size: int, group_lanes: int
) -> None:
    with pytest.raises(UserError, match=r"model\.batch_norm_lanes: .* would \(SET=") as refused:
        convert(nn.BatchNorm1d(3), lanes, 0, world_size, group_lanes)
    assert "\n" not in str(refused.value)


def test_groups_over_ranks_are_refused_while_there_is_no_process_group() -> None:
    with pytest.raises(RuntimeError, match="process group must be there"):
        convert(nn.BatchNorm1d(3), 1, 0, 2, 2)
