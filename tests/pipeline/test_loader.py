"""pipeline.loader and pipeline.pixels on real JPEGs, with every kind of damage planted."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data as photographs

from data_shards.reader import Sample
from pipeline.augment import AugmentSettings, CropSettings, Draws, draw, philox
from pipeline.loader import COMPARED_ONE_IN, Batch, Loader, LoaderSettings, compared, difference, render
from pipeline.pixels import NEEDLESS, Encoded, Graph, UndecodableError, digests, failure

SEED, BATCH, LANES, STEPS = 3, 8, 4, 5
AUGMENT = AugmentSettings(
    crops=(CropSettings(size=64, count=2, scale=(0.3, 1.0)), CropSettings(size=32, count=3, scale=(0.1, 0.35)))
)
CPU = LoaderSettings(device="cpu")


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()


@pytest.fixture(scope="module")
def tiles() -> list[bytes]:
    """40 JPEGs of different content and size."""
    photos = [Image.fromarray(photo()) for photo in (photographs.astronaut, photographs.coffee, photographs.cat)]
    rng = np.random.default_rng(SEED)
    made = []
    for k in range(40):
        photo = photos[k % 3]
        width, height = (int(side) for side in rng.integers(90, 200, 2))
        left, top = (int(rng.integers(0, side - 200)) for side in photo.size)
        made.append(encode(photo.crop((left, top, left + width, top + height))))
    return made


@dataclass
class MemoryReader:
    """Data in memory, read in order by all lanes in turn; the third kind of sample lives behind `sizes`, the index."""

    images: Sequence[bytes]
    sizes: Sequence[tuple[int, int]]
    lanes: range = range(LANES)
    size: int = BATCH
    known_bad: set[int] = field(default_factory=set)
    asked: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=lambda: {"bytes_read": 7.0})

    def batch(self, step: int) -> list[Sample]:
        self.asked.append(step)
        a_lane = self.size // LANES
        places = [(lane, step * a_lane + i) for lane in self.lanes for i in range(a_lane)]
        return [self._choose(lane, index) for lane, index in places]

    def replace(self, sample: Sample, reason: str) -> Sample:
        self.known_bad.add(sample.id)
        self.bad.append((sample.id, reason))
        return self._choose(sample.lane, sample.index)

    def _choose(self, lane: int, index: int) -> Sample:
        chain = [(lane + LANES * index + 11 * k) % len(self.images) for k in range(9)]
        k = next(k for k, candidate in enumerate(chain) if candidate not in self.known_bad)
        height, width = self.sizes[chain[k]]
        return Sample(chain[k], lane, index, self.images[chain[k]], width, height, tuple(chain[:k]))


def sizes_of(images: Sequence[bytes]) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(image)).size[::-1] for image in images]


def load(reader: MemoryReader, start: int = 0, settings: LoaderSettings = CPU) -> list[Batch]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of crops that are not the host's
        warnings.simplefilter("ignore", DeprecationWarning)  # DALI 2.4 on Python 3.13
        warnings.filterwarnings("ignore", NEEDLESS)
        return list(Loader(reader, AUGMENT, SEED, start, STEPS, settings))


def same(ours: Batch, theirs: Batch) -> bool:
    return ours.crop_hash == theirs.crop_hash and all(map(torch.equal, ours.crops, theirs.crops))


@pytest.fixture(scope="module")
def straight(tiles: list[bytes]) -> list[Batch]:
    return load(MemoryReader(tiles, sizes_of(tiles)))


def test_flattened_crops_are_channels_last_without_a_copy(straight: list[Batch]) -> None:
    for crops, size, count in zip(straight[0].crops, (64, 32), (2, 3), strict=True):
        assert crops.shape == (BATCH, count, 3, size, size)
        assert crops.dtype == torch.float32
        assert crops.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert crops.flatten(0, 1).data_ptr() == crops.data_ptr()


def test_two_ranks_see_the_crops_that_one_would(tiles: list[bytes], straight: list[Batch]) -> None:
    halves = [load(MemoryReader(tiles, sizes_of(tiles), lanes)) for lanes in (range(2), range(2, 4))]
    for whole, *parts in zip(straight, *halves, strict=True):
        assert whole.ids.tolist() == [sample for part in parts for sample in part.ids]
        assert (sum(part.crop_hash for part in parts) - whole.crop_hash) % 2**64 == 0
        for size in range(2):
            assert torch.equal(torch.cat([part.crops[size] for part in parts]), whole.crops[size])


@pytest.mark.parametrize("changes", [{"threads": 2}, {"queue": 1}, {"queue": 4}])
def test_threads_and_queue_change_no_crop(changes: dict[str, int], tiles: list[bytes], straight: list[Batch]) -> None:
    other = load(MemoryReader(tiles, sizes_of(tiles)), settings=CPU.model_copy(update=changes))
    assert len(other) == STEPS
    assert all(map(same, other, straight))


def test_a_start_in_the_middle_gives_the_crops_of_those_steps(tiles: list[bytes], straight: list[Batch]) -> None:
    reader = MemoryReader(tiles, sizes_of(tiles))
    later = load(reader, start=3)
    assert reader.asked == [3, 4]
    assert [batch.step for batch in later] == [3, 4]
    assert all(map(same, later, straight[3:]))


def test_batches_that_are_kept_are_not_overwritten_by_later_ones(straight: list[Batch], tiles: list[bytes]) -> None:
    loader = Loader(MemoryReader(tiles, sizes_of(tiles)), AUGMENT, SEED, 0, STEPS, CPU)
    copies = [[crops.clone() for crops in next(loader).crops] for _ in range(STEPS)]
    for batch, copied in zip(straight, copies, strict=True):
        assert all(map(torch.equal, batch.crops, copied))


def test_the_crop_hash_is_the_sum_of_64_bits_of_each_sample_whatever_their_order(straight: list[Batch]) -> None:
    batch = replace(straight[0], digests=straight[0].digests.clone())
    expected = 0
    for digest, lane, index in zip(batch.digests.tolist(), batch.lanes.tolist(), batch.indices.tolist(), strict=True):
        high, low = philox(np.array([[digest], [index], [0], [lane]], np.uint64), (0, 0))[:2, 0].tolist()
        expected += high * 2**32 + low
    assert batch.crop_hash % 2**64 == expected % 2**64
    turned = {"digests": batch.digests.flip(0), "lanes": batch.lanes[::-1], "indices": batch.indices[::-1]}
    assert replace(batch, **turned).crop_hash == batch.crop_hash


def test_the_difference_of_two_makings_is_the_worst_crops_in_levels_of_before_its_colour(tiles: list[bytes]) -> None:
    sizes = sizes_of(tiles)[:1]
    (height, width), one = np.array(sizes).T, np.zeros(1, np.int64)
    draws = draw(AUGMENT, SEED, one, one, height, width)
    host = render(tiles[:1], np.array(sizes), AUGMENT, draws)
    std = torch.tensor(AUGMENT.std)[:, None, None]
    device = [crops[0].clone() for crops in host]
    assert difference(device, host, draws, AUGMENT) == 0
    views = [crop for of_size in device for crop in of_size]
    for number, levels in ((1, 7.0), (4, 3.0)):
        gain = max(1.0, float(draws[number].brightness[0] * draws[number].contrast[0]))
        views[number].add_(levels * gain / 255 / std)
        assert difference(device, host, draws, AUGMENT) == pytest.approx(7.0, rel=1e-4)


def test_the_crop_hash_tells_pixels_and_places_apart(straight: list[Batch]) -> None:
    batch = straight[0]
    assert len({b.crop_hash for b in straight}) == STEPS
    assert replace(batch, digests=batch.digests ^ 1).crop_hash != batch.crop_hash
    assert replace(batch, digests=batch.digests.flip(0)).crop_hash != batch.crop_hash
    assert replace(batch, lanes=batch.lanes + 1).crop_hash != batch.crop_hash
    assert replace(batch, indices=batch.indices + 2**32).crop_hash != batch.crop_hash
    assert -(2**63) <= batch.crop_hash < 2**63


def test_one_bit_of_a_crop_changes_its_samples_digest_alone(straight: list[Batch]) -> None:
    before = [crops.clone(memory_format=torch.preserve_format) for crops in straight[0].crops]
    after = [crops.clone(memory_format=torch.preserve_format) for crops in before]
    after[1].view(torch.int32)[5, 2, 1, 30, 31] ^= 1
    assert torch.equal(digests(before), straight[0].digests)
    assert (digests(before) != digests(after)).nonzero().flatten().tolist() == [5]


def test_a_batch_that_was_prepared_is_handed_out_in_its_turn(tiles: list[bytes], straight: list[Batch]) -> None:
    loader = Loader(MemoryReader(tiles, sizes_of(tiles)), AUGMENT, SEED, 1, STEPS, CPU)
    assert len(loader) == STEPS - 1
    batches = []
    loader.prepare()
    loader.prepare()  # it has one already
    for batch in loader:
        batches.append(batch)
        waited = loader.counters["batch_wait_s"]
        loader.prepare()  # after the last one there is none
        assert (loader.counters["batch_wait_s"] > waited) == (batch.step < STEPS - 1)
    assert all(map(same, batches, straight[1:]))
    assert len(batches) == len(loader)


def test_undecodable_samples_are_replaced_as_if_the_reader_had_known_them(tiles: list[bytes]) -> None:
    """Every kind of damage, alone and together, two batches in a row, and a replacement that is bad as well."""
    sizes, damaged = sizes_of(tiles), list(tiles)
    garbage = np.random.default_rng(SEED).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    planted = {
        9: tiles[9][: len(tiles[9]) // 2],
        12: tiles[12][:60],
        14: b"",
        17: garbage,
        25: garbage,
        23: b"<html><body>503 Slow Down</body></html>",
        28: tiles[28][:2] + garbage,
    }
    for sample, data in planted.items():
        damaged[sample] = data
    unknowing = MemoryReader(damaged, sizes)
    loader = Loader(unknowing, AUGMENT, SEED, 0, STEPS, CPU)
    found = list(loader)
    knowing = load(MemoryReader(damaged, sizes, known_bad=set(planted)))
    assert [batch.step for batch in found] == list(range(STEPS))
    assert all(map(same, found, knowing))
    assert [batch.ids.tolist() for batch in found] == [batch.ids.tolist() for batch in knowing]
    assert [batch.replaced for batch in found] == [batch.replaced for batch in knowing] == [0, 3, 2, 2, 0]
    assert {sample for sample, _ in unknowing.bad} == set(planted)
    assert {sample for sample, _ in loader.bad} == set(planted)
    assert all(reason.startswith("does not decode: ") for _, reason in unknowing.bad)
    assert loader.counters["samples_undecodable"] >= len(planted)  # one is met again in a batch fetched ahead
    assert loader.counters["batches_repaired"] == 3
    assert loader.counters["bytes_read"] == 7
    assert loader.counters["batch_wait_s"] > 0


@pytest.mark.parametrize("step", [0, 1, STEPS - 1])
def test_a_batch_of_nothing_but_garbage_is_replaced_whole(tiles: list[bytes], step: int) -> None:
    bad = set(range(BATCH * step, BATCH * (step + 1)))
    damaged = [b"\xff\xd8garbage" if k in bad else image for k, image in enumerate(tiles)]
    reader = MemoryReader(damaged, sizes_of(tiles))
    batches = load(reader)
    assert {sample for sample, _ in reader.bad} == bad
    assert batches[step].replaced == BATCH
    assert all(map(same, batches, load(MemoryReader(damaged, sizes_of(tiles), known_bad=bad))))


def test_an_image_of_another_size_than_the_index_says_is_bad(tiles: list[bytes]) -> None:
    sizes = sizes_of(tiles)
    height, width = sizes[10]
    reader = MemoryReader(tiles, [*sizes[:10], (height, width + 30), *sizes[11:]])
    batches = load(reader)
    assert reader.bad == [(10, f"decodes to {height} x {width} pixels, not {height} x {width + 30}")]
    assert all(map(same, batches, load(MemoryReader(tiles, sizes, known_bad={10}))))


def test_an_error_of_the_reader_ends_the_iteration_as_it_is(tiles: list[bytes]) -> None:
    class NoAnswerError(Exception):
        pass

    class FailingReader(MemoryReader):
        def batch(self, step: int) -> list[Sample]:
            if step == 3:
                raise NoAnswerError("no answer")
            return super().batch(step)

    loader = Loader(FailingReader(tiles, sizes_of(tiles)), AUGMENT, SEED, 0, STEPS, CPU)
    with pytest.raises(NoAnswerError, match="no answer"):
        list(loader)
    loader.close()


def test_a_graph_that_is_opened_again_goes_on_with_the_batches_in_work(
    tiles: list[bytes], straight: list[Batch]
) -> None:
    """What a GPU's graph does after two failed runs."""
    reader = MemoryReader(tiles, sizes_of(tiles))
    loader = Loader(reader, AUGMENT, SEED, 0, STEPS, CPU)
    batches = [next(loader), next(loader)]
    loader._graph = None
    batches += list(loader)
    assert len(batches) == STEPS
    assert all(map(same, batches, straight))
    assert reader.asked == list(range(STEPS))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_the_orientation_that_exif_gives_is_honoured(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encode(Image.fromarray(photographs.astronaut()).crop((100, 0, 300, 160)), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    assert np.abs(top_left(turned, upright.size[::-1]) - np.asarray(upright, np.float64)[:160, :160]).mean() < 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_kind_of_pixel_comes_out_as_rgb(mode: str) -> None:
    photo = Image.fromarray(photographs.astronaut()).crop((100, 0, 260, 160))
    deep = Image.fromarray(np.asarray(photo.convert("L"), np.uint16) * 257)
    stored = deep if mode == "I;16" else photo.convert(mode)
    expected = photo.convert("L" if mode == "I;16" else mode).convert("RGB")
    ours = top_left(encode(stored, "TIFF" if mode == "CMYK" else "PNG"), (160, 160))
    assert np.abs(ours - np.asarray(expected, np.float64)).mean() < 1


def top_left(image: bytes, size: tuple[int, int]) -> np.ndarray:
    """Its upper left 160 x 160 pixels as they leave the loader, as values from 0 to 255."""
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    box = np.array([[0, 0, 160, 160]], np.int32)
    (crops,) = render([image], np.array([size]), AUGMENT, [Draws(160, box, zero > 0, one, one, one, zero, zero)])
    return 255 * (crops[0, 0].permute(1, 2, 0).numpy().astype(np.float64) * AUGMENT.std + AUGMENT.mean)


def test_rendering_an_image_that_does_not_decode_says_so(tiles: list[bytes]) -> None:
    sizes = np.array(sizes_of(tiles[:2]))
    drawn = draw(AUGMENT, SEED, np.zeros(2, np.int64), np.arange(2), sizes[:, 0], sizes[:, 1])
    with pytest.raises(ValueError, match="does not decode"):
        render([tiles[0], tiles[1][:500]], sizes, AUGMENT, drawn)


DALIS = "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`\n"


def test_a_gpu_that_is_full_or_broken_is_no_image_that_does_not_decode() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    full, large, broken = (
        RuntimeError(f"{DALIS}CUDA allocation failed"),
        RuntimeError(f"{DALIS}Can't allocate 268435456 bytes on device 0."),
        RuntimeError(
            f"{DALIS}CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered"
        ),
    )
    for out_of_memory in (full, large):
        assert isinstance(failure(out_of_memory, gpu), torch.OutOfMemoryError)
    assert failure(broken, gpu) is broken
    damaged = failure(RuntimeError(f"{DALIS}Failed to decode sample #3: nvJPEG error: bad JPEG"), gpu)
    assert isinstance(damaged, UndecodableError)
    assert str(damaged) == "does not decode: Failed to decode sample #3: nvJPEG error: bad JPEG"
    assert isinstance(failure(full, cpu), UndecodableError)


@pytest.mark.parametrize("count", [1, 16, 64, 3000])
def test_one_sample_in_ten_thousand_is_compared_with_the_host_by_all_ranks_at_the_same_steps(count: int) -> None:
    turns = {step: compared(step, count) for step in range(100 * COMPARED_ONE_IN // count)}
    taken = {step: i for step, i in turns.items() if i is not None}
    assert 100 <= len(taken) <= 112
    assert set(taken) == set(range(0, len(turns), COMPARED_ONE_IN // count))
    assert all(0 <= i < count for i in taken.values())
    assert len(set(taken.values())) > min(count, 100) // 2  # now one, now another
    assert COMPARED_ONE_IN == 10_000


def test_a_batch_of_more_than_ten_thousand_has_one_compared_at_each_step() -> None:
    assert all(compared(step, 20_000) is not None for step in range(5))


class Crossed(Graph):
    """Decodes, but each sample of a batch gets its neighbour's pixels."""

    def collect(self, batch: Encoded) -> list[torch.Tensor]:
        return [crops.copy_(crops.roll(1, dims=0)) for crops in super().collect(batch)]


def test_crops_that_are_not_those_of_the_hosts_decode_are_counted_and_warned_of(
    tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.loader.COMPARED_ONE_IN", 4)
    right = Loader(MemoryReader(tiles, sizes_of(tiles)), AUGMENT, SEED, 0, STEPS, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # DALI 2.4 on Python 3.13
        made = list(right)
    wrong = Loader(MemoryReader(tiles, sizes_of(tiles)), AUGMENT, SEED, 0, STEPS, CPU, graph=Crossed)
    with pytest.warns(UserWarning, match=r"sample \d+: its crops on cpu differ from the host's by \d+ levels"):
        assert [batch.step for batch in wrong] == [batch.step for batch in made]
    assert right.counters["decode_compared"] == wrong.counters["decode_compared"] > 3
    assert right.counters["decode_mismatch"] == 0
    assert wrong.counters["decode_mismatch"] == wrong.counters["decode_compared"]


@pytest.mark.slow
def test_one_giant_image_among_small_ones_gives_its_crops_and_changes_no_others(
    tiles: list[bytes], straight: list[Batch]
) -> None:
    photo = Image.fromarray(photographs.astronaut())
    images = [*tiles[:13], encode(photo.resize((8000, 6000))), *tiles[14:]]
    batches = load(MemoryReader(images, sizes_of(images)))
    place = batches[1].ids.tolist().index(13)
    others = [i for i in range(BATCH) if i != place]
    assert all(map(same, batches[:1] + batches[2:], straight[:1] + straight[2:]))
    for ours, theirs in zip(batches[1].crops, straight[1].crops, strict=True):
        assert torch.equal(ours[others], theirs[others])
    # the same crops of the same photograph, which is as large as a crop needs it
    small = encode(photo.resize((500, 375)), quality=97)
    sizes = np.array([[375, 500]])
    drawn = draw(AUGMENT, SEED, batches[1].lanes[[place]], batches[1].indices[[place]], *sizes.T)
    for ours, theirs in zip(batches[1].crops, render([small], sizes, AUGMENT, drawn), strict=True):
        assert (255 * 0.229 * (ours[place] - theirs[0]).abs()).mean() < 6


@pytest.mark.slow
def test_ten_thousand_tiny_images_are_all_seen_once_and_none_is_bad() -> None:
    photo = Image.fromarray(photographs.astronaut())
    tiny = [encode(photo.crop((k % 400, k // 25, k % 400 + 1 + k % 12, k // 25 + 1 + k % 7))) for k in range(10_000)]
    reader = MemoryReader(tiny, sizes_of(tiny), size=400)
    small = AugmentSettings(crops=(CropSettings(size=32, count=1, scale=(0.3, 1.0)),))
    batches = list(Loader(reader, small, SEED, 0, 25, CPU))
    assert sorted(np.concatenate([batch.ids for batch in batches])) == list(range(10_000))
    assert not reader.bad
    assert all(torch.isfinite(batch.crops[0]).all() for batch in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_nearly_the_crops_of_a_cpu_and_outlives_garbage(tiles: list[bytes]) -> None:
    """Two batches in a row do not decode; decoders and filters may differ by a level or two."""
    damaged = [b"\xff\xd8garbage" if k in (9, 17) else image for k, image in enumerate(tiles)]
    reader = MemoryReader(damaged, sizes_of(tiles))
    batches = load(reader, settings=LoaderSettings(device="cuda"))
    expected = load(MemoryReader(damaged, sizes_of(tiles), known_bad={9, 17}))
    assert {sample for sample, _ in reader.bad} == {9, 17}
    for ours, theirs in zip(batches, expected, strict=True):
        for gpu, cpu in zip(ours.crops, theirs.crops, strict=True):
            assert gpu.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
            assert 255 * 0.229 * (gpu.cpu() - cpu).abs().mean() < 2
    again = load(MemoryReader(damaged, sizes_of(tiles)), settings=LoaderSettings(device="cuda"))
    assert [batch.crop_hash for batch in again] == [batch.crop_hash for batch in batches]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_that_was_made_while_the_gpu_had_work_was_not_waited_for(tiles: list[bytes]) -> None:
    settings, matrix = LoaderSettings(device="cuda"), torch.randn(8192, 8192, device="cuda")
    loader = Loader(MemoryReader(tiles, sizes_of(tiles)), AUGMENT, SEED, 0, STEPS, settings)
    next(loader)
    waited = []
    for kernels in (0, 100, 0):  # a hundred take some seconds
        torch.cuda.synchronize()
        for _ in range(kernels):
            matrix @ matrix
        before = loader.counters["batch_wait_s"]
        next(loader)
        waited.append(loader.counters["batch_wait_s"] > before)
    assert waited == [True, False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_jpeg_engine_of_a_gpu_gives_the_same_crops_while_a_long_kernel_runs(tiles: list[bytes]) -> None:
    """The engine has been seen to write when it is called and not when its stream gets there."""
    sizes, matrix = sizes_of(tiles), torch.randn(8192, 8192, device="cuda")

    def made(share: float, busy: bool) -> list[Batch]:
        settings = LoaderSettings(device="cuda", hardware_jpeg=share, queue=3)
        loader = Loader(MemoryReader(tiles, sizes), AUGMENT, SEED, 0, STEPS, settings)
        batches = []
        for _ in range(STEPS):
            for _ in range(20 if busy else 0):
                matrix @ matrix  # some hundred milliseconds on torch's stream; nobody waits for them
            batches.append(next(loader))
            if not busy:
                torch.cuda.synchronize()
        return batches

    without, idle = made(0.0, busy=True), made(1.0, busy=False)
    for _ in range(20):
        assert [batch.crop_hash for batch in made(1.0, busy=True)] == [batch.crop_hash for batch in idle]
    for ours, theirs in zip(idle, without, strict=True):  # two decoders: a level or two apart
        for engine, kernels in zip(ours.crops, theirs.crops, strict=True):
            assert (255 * 0.229 * (engine - kernels).abs()).flatten(1).mean(1).max() < 4
