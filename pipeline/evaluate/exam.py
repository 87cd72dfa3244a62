"""How well the frozen trunk of a run tells labelled images apart: nearest neighbours and a linear probe.

    exam = open_exam(run, "s3://imagenet/train", "s3://imagenet/val")
    exam.extract(exam.left())   # anywhere, by any number of processes
    exam.score()                # by one of them, when nothing is left

The bank is what is learnt from, the held-out set what is asked. Neighbours vote as in Wu et al. (arXiv 1805.01978) and
DINO; the probe is the optimum of a logistic regression on features of unchanged images, for which SEER trained one on
augmented images: theirs comes out somewhat higher.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import groupby

import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.progress import Progress, quiet
from data_shards.store import NotFound, Store
from pipeline import commit
from pipeline.config import Config
from pipeline.evaluate.extract import Features, extract
from pipeline.evaluate.knn import nearest, vote
from pipeline.evaluate.labels import Labels, read_labels
from pipeline.evaluate.probe import Probe, fit
from pipeline.evaluate.score import Score, read_scores, score_path
from pipeline.loader import device_of
from pipeline.run import read_config
from pipeline.weights import trained_trunk

NEIGHBOURS = (1, 20, 200)
_ROWS = 4096  # asked at once


@dataclass(frozen=True)
class Exam:
    """A step of a run, asked about a pair of sets."""

    run: Store
    config: Config
    step: int
    bank: Features
    held_out: Features

    @cached_property
    def name(self) -> str:
        """Of the question, the same for all steps. It tells apart what could make the figures others.

        That is images, labels, what was removed, and the size. Raises UserError where the sets cannot be asked about.
        """
        sets = [(one.shards.manifest.contents_id, one.removed.hash) for one in (self.bank, self.held_out)]
        return blake2b(json.dumps([sets, self.labels.digest, self.bank.size]).encode(), digest_size=6).hexdigest()

    @property
    def path(self) -> str:
        """Of the score."""
        return score_path(f"{self.step:09d}", self.name)

    @cached_property
    def parts(self) -> list[tuple[Features, int]]:
        """All groups of both sets."""
        return [(one, group) for one in (self.bank, self.held_out) for group in range(len(one.groups))]

    @cached_property
    def labels(self) -> Labels:
        of_bank, of_held_out = ((one.shards, one.removed) for one in (self.bank, self.held_out))
        return read_labels(of_bank, of_held_out)

    def found(self) -> Score | None:
        """The score, when this was asked before."""
        try:
            return Score(**json.loads(self.run.get(self.path)))
        except NotFound:
            return None

    def begin(self, keep: bool = False) -> None:
        """Keep the checkpoint from being deleted. keep: also the features, when the score is there."""
        for features in (self.bank, self.held_out):
            features.begin(self.name, keep)

    def forget(self) -> None:
        """Let it be asked again."""
        self.run.delete([self.path])

    def release(self) -> None:
        """Of no more use to this exam are features from now on."""
        for features in (self.bank, self.held_out):
            features.release(self.name)

    def left(self) -> list[int]:
        """The parts whose features are not there yet, by their numbers."""
        missing = {(one.folder, group) for one in (self.bank, self.held_out) for group in one.left()}
        return [number for number, (one, group) in enumerate(self.parts) if (one.folder, group) in missing]

    def extract(self, numbers: Iterable[int], threads: int = 1, progress: Progress = quiet) -> None:
        """Make the features of these parts, on a GPU where there is one.

        Raises commit.Damaged when the checkpoint is, and UserError.
        """
        wanted = [self.parts[number] for number in numbers]
        if not wanted:
            return
        trunk = trained_trunk(self.run, self.config, self.step)[0].to(device_of("auto")).eval()
        trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for _, of_set in groupby(wanted, lambda part: part[0].folder):
            parts = list(of_set)
            extract(parts[0][0], [group for _, group in parts], trunk, self.config.augment, threads, progress)

    def score(self) -> Score:
        """Ask, write the score to the run's folder, and delete the features unless they are to be kept.

        Raises NotFound when another evaluation was quicker, and has deleted features.
        """
        (of_bank, bank), (of_held_out, held_out) = (one.read(device_of("auto")) for one in (self.bank, self.held_out))
        labels, asked = (
            torch.from_numpy(numbers[ids]).to(bank.device)
            for numbers, ids in ((self.labels.bank, of_bank), (self.labels.held_out, of_held_out))
        )
        classes = len(self.labels.names)
        probe = fit(bank, labels, classes)
        score = Score(
            run=self.run.url,
            step=self.step,
            bank_url=self.bank.shards.store.url,
            held_out_url=self.held_out.shards.store.url,
            size=self.bank.size,
            bank=len(bank),
            held_out=len(held_out),
            classes=classes,
            decay=probe.decay,
            right=by_neighbours(bank, labels, held_out, asked, classes) | by_probe(probe, held_out, asked),
        )
        self.run.put(self.path, json.dumps(asdict(score)).encode())
        self.release()
        return score

    def history(self) -> list[Score]:
        """The scores of all steps of the run on the same sets, the oldest first."""
        return read_scores(self.run, self.name)


def open_exam(run: Store, bank_url: str, held_out_url: str, step: int | None = None, size: int | None = None) -> Exam:
    """run: the run's folder. step: of a checkpoint, by default the newest; size: pixels, by default the largest crop's.

    Raises UserError when the run, a checkpoint or a set is not there, or when both sets are one.
    """
    config = read_config(run)
    step, size = commit.existing(run, step)[0].step, size or max(crop.size for crop in config.augment.crops)
    bank, held_out = (Features(run, step, ShardSet.open(Store(url)), size) for url in (bank_url, held_out_url))
    if bank.shards.manifest.contents_id == held_out.shards.manifest.contents_id:
        raise UserError(
            f"{bank_url} and {held_out_url} hold the same images: each would find itself; HELD_OUT= takes a set that "
            "shares none with BANK="
        )
    return Exam(run, config, step, bank, held_out)


def by_neighbours(bank: Tensor, labels: Tensor, held_out: Tensor, asked: Tensor, classes: int) -> dict[str, float]:
    """Shares whose most similar images vote for the right label. bank: (N, C); held_out: (M, C); labels of both."""
    right = dict.fromkeys(NEIGHBOURS, 0)
    for queries, wanted in zip(torch.split(held_out, _ROWS), torch.split(asked, _ROWS), strict=True):
        similarity, places = nearest(bank, queries, max(NEIGHBOURS))
        for k in NEIGHBOURS:
            voted = vote(similarity[:, :k], labels[places[:, :k]], classes)
            right[k] += int((voted == wanted).sum())
    return {f"knn{k}": count / len(held_out) for k, count in right.items()}


def by_probe(probe: Probe, held_out: Tensor, asked: Tensor) -> dict[str, float]:
    """Shares whose label is the probe's first, and is among its first five."""
    first = five = 0
    for queries, wanted in zip(torch.split(held_out, _ROWS), torch.split(asked, _ROWS), strict=True):
        best = probe.logits(queries).topk(min(5, len(probe.bias)), dim=1).indices == wanted[:, None]
        first, five = first + int(best[:, 0].sum()), five + int(best.any(dim=1).sum())
    return {"probe": first / len(held_out), "probe_top5": five / len(held_out)}
