"""Copy detection: whether a changed image finds the image that it was made of."""

from torch import Tensor

from pipeline.evaluate.knn import nearest


def found(originals: Tensor, copies: Tensor) -> Tensor:
    """Whether copy i is more similar to original i than to any other. Both (N, C), returns (N,) bool."""
    _, places = nearest(originals, copies, k=1)
    return places[:, 0] == places.new_tensor(range(len(copies)))
