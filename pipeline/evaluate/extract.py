"""Features of a labelled set of any size under a frozen trunk, a group of shards at a time, kept in the run's folder.

    eval/step-000001000/features-<set>-224/about.json           put first: which set, how looked at
                                           for-<exam>           who needs them: the last of these deletes them all
                                           keep-<exam>          who wants them kept
                                           00003.safetensors    ids (n,) int64, features (n, C) float16

A group that is there is not made again, so that the work may be dealt to any number of processes and go on after any of
them has died. An image is seen as timm and torchvision show it to a classifier: its shorter side is resized to
size / 0.875, the middle of it is cut out. Batch norms use the statistics of the checkpoint.
"""

import json
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

from data_shards.cutter import Fetched, Payload
from data_shards.errors import UserError
from data_shards.fetch import Fetcher
from data_shards.index import ShardSet, sample_key
from data_shards.progress import Progress, quiet
from data_shards.removed import Removed, read_removed
from data_shards.store import Store
from pipeline import snapshot
from pipeline.augment import AugmentSettings
from pipeline.evaluate.tiles import unusable
from pipeline.evaluate.views import culprit, plain
from pipeline.pixels import Encoded, Graph, UndecodableError

SHARE = 0.875  # of the shorter side that is seen
GROUP = 10_000  # images at least, but for the last
BATCH = 128
AHEAD = 8  # batches that are asked for before they are needed
DEPTH = 2  # batches that DALI works on ahead of the trunk
RANGE_BYTES = 8 * 2**20
RETRY_SECONDS = 600.0
SHARE_OF_FREE = 0.8  # of a GPU's memory; the rest is for blocks of them in fp32

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Features:
    """Where the features of a set lie, and of which images. run: the run's folder; size: pixels."""

    run: Store
    step: int
    shards: ShardSet
    size: int

    @property
    def folder(self) -> str:
        manifest = self.shards.manifest  # its layout is of names and places: other images may lie there
        pixels = blake2b(f"{manifest.layout_id} {manifest.contents_id}".encode(), digest_size=16).hexdigest()
        return f"eval/step-{self.step:09d}/features-{pixels}-{self.size}"

    @cached_property
    def groups(self) -> list[range]:
        """Ids of shards that follow each other."""
        found, first = [], 0
        for end in self.shards.starts[1:].tolist():
            if end - first >= GROUP:
                found.append(range(first, end))
                first = end
        return [*found, range(first, self.shards.manifest.samples)] if first < self.shards.manifest.samples else found

    @cached_property
    def removed(self) -> Removed:
        return read_removed(self.shards)

    def ids(self, group: int) -> Ids:
        """Of the images of a group, without the removed ones."""
        whole = self.groups[group]
        return np.setdiff1d(np.arange(whole.start, whole.stop), self.removed.ids.astype(np.int64))

    def begin(self, exam: str, keep: bool = False) -> None:
        """Say what is to come and for which exam; from then on the checkpoint stays. keep: so do the features."""
        manifest = self.shards.manifest
        ids = {"layout_id": manifest.layout_id, "contents_id": manifest.contents_id}
        about = {"set": self.shards.store.url, **ids, "size": self.size, "step": self.step}
        self.run.put(f"{self.folder}/about.json", json.dumps(about).encode())
        self.run.put(f"{self.folder}/{'keep' if keep else 'for'}-{exam}", b"")

    def left(self) -> list[int]:
        """The groups that are not there yet."""
        there = {entry.path for entry in self.run.list(self.folder)}
        return [group for group in range(len(self.groups)) if self._path(group) not in there]

    def put(self, group: int, ids: Ids, features: Tensor) -> None:
        """Keep a group, whole or not at all."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "features.safetensors"
            snapshot.write({"ids": torch.from_numpy(ids), "features": features}, file)
            self.run.upload(file, self._path(group))

    def read(self, device: torch.device) -> tuple[Ids, Tensor]:
        """Without images removed since: ids (N,), and their features (N, C) float16 on the device.

        Raises UserError when these do not fit there.
        """
        wanted = [self.ids(group) for group in range(len(self.groups))]
        features, done = torch.empty(0, 0), 0
        for group, ids in enumerate(wanted):
            if not len(ids):
                continue
            tensors = load(self.run.get(self._path(group)))
            if not done:
                shape = (sum(map(len, wanted)), tensors["features"].shape[1])
                _refuse_too_large(self.shards.store.url, shape, device)
                features = torch.empty(shape, dtype=torch.float16, device=device)
            kept = torch.from_numpy(np.isin(tensors["ids"].numpy(), ids))
            features[done : done + len(ids)] = tensors["features"][kept].to(device)
            done += len(ids)
        return np.concatenate(wanted), features

    def release(self, exam: str) -> None:
        """Delete them, unless another exam needs them or one wants them kept."""
        there, own = [entry.path for entry in self.run.list(self.folder)], f"{self.folder}/for-{exam}"
        wanted = {path for path in there if path.startswith((f"{self.folder}/for-", f"{self.folder}/keep-"))}
        self.run.delete([own] if wanted - {own} else there)

    def _path(self, group: int) -> str:
        return f"{self.folder}/{group:05d}.safetensors"


def _refuse_too_large(url: str, shape: tuple[int, int], device: torch.device) -> None:
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()  # of what made the features
    needed, free = 2 * shape[0] * shape[1], torch.cuda.mem_get_info(device)[0]
    if needed > SHARE_OF_FREE * free:
        raise UserError(
            f"{url}: features of {shape[0]:,} images, {shape[1]:,} numbers each, take {needed / 1e9:.1f} GB, and the "
            f"GPU has {free / 1e9:.1f} GB free; the same command goes on where one has more"
        )


def extract(
    made: Features,
    groups: Sequence[int],
    trunk: nn.Module,
    augment: AugmentSettings,
    threads: int = 1,
    progress: Progress = quiet,
) -> None:
    """Make these groups, one after the other, on the trunk's device. augment: gives the mean and std of pixels.

    trunk: (n, 3, s, s) -> (n, C), in evaluation mode. In bf16 on a GPU, in fp32 on a CPU.
    Raises UserError for an image that cannot be had or does not decode: figures of what is left would be others.
    """
    ids = [made.ids(group) for group in groups]
    batches = [[part[first : first + BATCH] for first in range(0, len(part), BATCH)] for part in ids]
    every, device = [part for parts in batches for part in parts], next(trunk.parameters()).device
    done, total = 0, sum(map(len, ids))
    with closing(_looked_at(made, every, augment, threads, device)) as looked:
        for group, whole, parts in zip(groups, ids, batches, strict=True):
            features = []
            for part in parts:
                features.append(_forward(trunk, next(looked)))
                done += len(part)
                progress("images", done, total)
            made.put(group, whole, torch.cat(features) if features else torch.empty(0, 0, dtype=torch.float16))


@torch.no_grad()
def _forward(trunk: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        features: Tensor = trunk(images.contiguous(memory_format=torch.channels_last)).half().cpu()
    if not features.isfinite().all():
        raise UserError("the trunk's features are not finite: it has diverged; make status shows how its run has gone")
    return features


def _looked_at(
    made: Features, batches: Sequence[Ids], augment: AugmentSettings, threads: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """(n, 3, size, size) of each batch of ids, normalised, on the device; fetched and decoded ahead."""
    decoding = deque[tuple[Ids, Encoded]]()
    with closing(_encoded(made, batches)) as encoded:

        def feed() -> Encoded:
            decoding.append(next(encoded))
            return decoding[-1][1]

        graph = Graph(augment, [made.size], BATCH, device, threads=threads, depth=DEPTH, feed=feed)
        for _ in batches:
            graph.schedule()
            ids, work = decoding.popleft()
            try:
                (crops,) = graph.collect(work)
            except UndecodableError as error:
                told = partial(_unusable, made, ids)
                found = culprit(work.images, work.sizes, augment, told)
                raise found or UserError(f"{made.shards.store.url}: {error}") from error
            yield crops[:, 0]


def _unusable(made: Features, ids: Ids, row: int, reason: str) -> UserError:
    return unusable(made.shards.store.url, sample_key(*made.shards.locate(int(ids[row]))), reason)


def _encoded(made: Features, batches: Iterable[Ids]) -> Generator[tuple[Ids, Encoded], None, None]:
    """The batches' bytes, with the middle of each image as what is to be seen."""
    with closing(_fetched(made.shards, batches)) as coming:
        for ids, fetched in coming:
            for row, found in enumerate(fetched):
                if not isinstance(found, Payload):
                    raise _unusable(made, ids, row, found.reason)
            images = [found for found in fetched if isinstance(found, Payload)]
            sizes = np.array([(image.height, image.width) for image in images], np.int64)
            yield ids, Encoded([image.data for image in images], sizes, [plain(sizes, made.size, SHARE)])


def _fetched(shards: ShardSet, batches: Iterable[Ids]) -> Generator[tuple[Ids, list[Fetched]], None, None]:
    """Asked for AHEAD batches before they are needed."""
    fetcher = Fetcher(shards, RANGE_BYTES, RETRY_SECONDS)

    async def close() -> None:
        fetcher.close()

    async def read(ids: Ids) -> list[Fetched]:
        """Those between, which were removed, come along."""
        found = await fetcher.samples(int(ids[0]), int(ids[-1] - ids[0]) + 1)
        return [found[place] for place in (ids - ids[0]).tolist()]

    reads = ((ids, shards.store.submit(read(ids))) for ids in batches)
    ahead = deque[tuple[Ids, Future[list[Fetched]]]]()
    try:
        ahead.extend(islice(reads, AHEAD))
        while ahead:
            ids, coming = ahead.popleft()
            found = coming.result()
            ahead.extend(islice(reads, 1))
            yield ids, found
    finally:
        for _, coming in ahead:
            coming.cancel()
        shards.store.submit(close()).result()
