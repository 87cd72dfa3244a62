"""A checkpoint asked about two sets: figures by plain means, kept, listed by step, and what cannot be asked."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.errors import UserError
from data_shards.pack import Source
from pipeline.evaluate import extract as extracting
from pipeline.evaluate.exam import by_neighbours, by_probe, open_exam
from pipeline.evaluate.probe import fit
from pipeline.evaluate.score import TITLES, lines
from tests.photos import write_tiles
from tests.pipeline.evaluate.sets import labelled, packed
from tests.pipeline.test_export import a_run


def clouds(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around a centre of each class, in half precision, as they are kept."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, 12))
    x = centres[labels] + 2 * drawn.normal(size=(count, 12)) + 0.5
    return torch.tensor(x, dtype=torch.float16), torch.tensor(labels)


def test_neighbours_are_right_as_often_as_scikit_learn_finds() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    (bank, labels), (held_out, asked) = clouds(400, 8, 1), clouds(150, 8, 2)
    found = by_neighbours(bank, labels, held_out, asked, classes=8)
    for k in (1, 20, 200):
        other = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        other.fit(bank.double().numpy(), labels.numpy())
        assert found[f"knn{k}"] == pytest.approx(other.score(held_out.double().numpy(), asked.numpy()), abs=0.01)
    assert 0.3 < found["knn20"] < 0.99


def test_the_probe_is_right_as_often_as_its_logits_say() -> None:
    (bank, labels), (held_out, asked) = clouds(400, 8, 1), clouds(150, 8, 2)
    probe = fit(bank, labels, classes=8)
    order = probe.logits(held_out).numpy().argsort(axis=1)[:, ::-1]
    found = by_probe(probe, held_out, asked)
    assert found["probe"] == np.mean(order[:, 0] == asked.numpy())
    assert found["probe_top5"] == np.mean([label in row[:5] for label, row in zip(asked.tolist(), order, strict=True)])
    assert found["probe"] < found["probe_top5"] < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_figures() -> None:
    sets = [*clouds(4000, 8, 1), *clouds(1500, 8, 2)]
    figures = []
    for device in ("cpu", "cuda"):
        bank, labels, held_out, asked = (tensor.to(device) for tensor in sets)
        probe = fit(bank, labels, classes=8)
        figures.append(by_neighbours(bank, labels, held_out, asked, 8) | by_probe(probe, held_out, asked))
    assert figures[0] == pytest.approx(figures[1], abs=0.002)


def test_of_two_classes_one_is_always_among_the_first_five() -> None:
    x, labels = clouds(40, 2, 1)
    assert by_probe(fit(x, labels, classes=2), x, labels)["probe_top5"] == 1


@pytest.mark.slow
def test_an_exam_goes_on_where_it_was_is_kept_and_stands_beside_those_of_other_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extracting, "GROUP", 20)
    run, _ = a_run(tmp_path, 3, 6)
    urls = [shards.store.url for shards in labelled(tmp_path, 120)]
    exam = open_exam(run, *urls, size=48)
    assert (exam.step, exam.bank.size, exam.found()) == (6, 48, None)
    exam.begin(keep=True)
    assert run.exists(f"{exam.bank.folder}/about.json")
    assert len(exam.left()) == len(exam.parts) > 3
    exam.extract([0, 3])
    again = open_exam(run, *urls, step=6, size=48)
    assert 0 not in again.left()
    assert len(again.left()) == len(exam.parts) - 2
    again.extract(again.left(), threads=2)
    score = again.score()
    assert score == exam.found()
    assert (score.bank, score.held_out, score.classes) == (80, 40, 6)
    assert score.right.keys() == TITLES.keys()
    assert score.right["knn1"] > 0.5  # six photographs whose tiles look alike: also an untrained trunk sees that
    assert exam.left() == []
    assert again.score() == score
    assert exam.left() == []  # kept

    earlier = open_exam(run, *urls, step=3, size=48)
    earlier.begin()
    earlier.extract(earlier.left())
    earlier.score()
    assert len(earlier.left()) == len(earlier.parts)  # deleted
    assert [one.step for one in exam.history()] == [3, 6]
    other = open_exam(run, *urls, size=32)
    assert other.path != exam.path
    assert other.history() == []
    text = lines(score, exam.history())
    assert "80 images of" in text[0]
    assert "guessing: 16.7%" in text[0]
    assert text[1].split("  ")[-1].strip() == "probe, first 5"
    assert [line.split()[0] for line in text[2:]] == ["3", "6"]


def test_what_cannot_be_asked_is_told_in_a_line(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path, 3, 6)
    bank, held_out = (shards.store.url for shards in labelled(tmp_path, 30))
    with pytest.raises(UserError, match="no checkpoint of step 5; there are 3, 6"):
        open_exam(run, bank, held_out, step=5)
    with pytest.raises(UserError, match=r"nowhere: no MANIFEST[.]json, so no shard set"):
        open_exam(run, bank, f"file://{tmp_path}/nowhere")
    fresh, _ = a_run(tmp_path / "fresh")
    with pytest.raises(UserError, match="no checkpoint yet"):
        open_exam(fresh, bank, held_out)
    with pytest.raises(UserError, match="no such run"):
        open_exam(run.at("other"), bank, held_out)
    with pytest.raises(UserError, match="bank hold the same images: each would find itself; HELD_OUT="):
        open_exam(run, bank, bank)


def test_other_pixels_or_labels_under_the_same_names_are_asked_anew(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path, 3)
    files = sorted(write_tiles(tmp_path / "photos", 30, 72).glob("*/*.jpg"))
    sources = [Source(str(file), name=file.name, label=file.parent.name) for file in files]
    coarse = [source._replace(label=str(n % 2)) for n, source in enumerate(sources)]
    sets = {
        "plain": packed(tmp_path / "plain", sources),
        "small": packed(tmp_path / "small", sources, longest_side=40),
        "coarse": packed(tmp_path / "coarse", coarse),
    }
    asked = {
        "plain": packed(tmp_path / "asked", sources[:12]),
        "small": packed(tmp_path / "asked small", sources[:12], longest_side=40),
        "coarse": packed(tmp_path / "asked coarse", coarse[:12]),
    }
    exams = {name: open_exam(run, of.store.url, asked[name].store.url, size=32) for name, of in sets.items()}
    assert len({exam.path for exam in exams.values()}) == 3
    assert exams["small"].bank.folder != exams["plain"].bank.folder
    assert exams["coarse"].bank.folder == exams["plain"].bank.folder  # pixels are the same


@pytest.mark.slow
def test_features_stay_while_another_exam_needs_them(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path, 3)
    bank, held_out = (shards.store.url for shards in labelled(tmp_path, 60))
    one, other = open_exam(run, bank, held_out, size=32), open_exam(run, held_out, bank, size=32)
    for exam in (one, other):
        exam.begin()
        exam.extract(exam.left())
    one.score()
    assert other.left() == []
    other.score()
    assert run.list("eval/step-000000003")
    assert not [entry.path for entry in run.list("eval") if "/features-" in entry.path]
