"""Copy detection against a plain loop."""

import numpy as np
import torch

from pipeline.evaluate.copies import found


def test_a_copy_is_found_when_no_other_original_is_nearer() -> None:
    drawn = np.random.default_rng(0)
    originals = drawn.normal(size=(50, 6))
    copies = originals + 0.8 * drawn.normal(size=(50, 6))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    expected = [
        all(cosine(copies[i], originals[i]) > cosine(copies[i], originals[j]) for j in range(50) if j != i)
        for i in range(50)
    ]
    assert 5 < sum(expected) < 45  # neither nothing nor everything
    assert found(torch.tensor(originals), torch.tensor(copies)).tolist() == expected


def test_features_that_say_nothing_find_one_copy_in_all() -> None:
    assert found(torch.ones(40, 3), torch.ones(40, 3)).sum() == 1
