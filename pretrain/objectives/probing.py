"""How good frozen features are: the classes of nearest neighbours, and a linear classifier."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024
"""Test images at a time."""


def knn_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test images whose class the neighbours vote for.

    Each of the `neighbours` most similar training images votes with exp(cosine / temperature), as
    is usual for self-supervised encoders.

    train, test: (N, D) and (M, D) float32; labels: (N,) and (M,) int64.
    """
    train = F.normalize(train, dim=1)
    classes = int(train_labels.max()) + 1
    hits = 0
    for part, labels in zip(test.split(_CHUNK), test_labels.split(_CHUNK), strict=True):
        similarity = F.normalize(part, dim=1) @ train.T
        best, index = similarity.topk(min(neighbours, len(train)), dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[index], (best / temperature).exp())
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(test)


def linear_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0),
    seed: int = 0,
) -> tuple[float, float]:
    """Top-1 of multinomial logistic regression on standardised features.

    Its inverse regularisation is the one of `strengths` that does best on a tenth of the training
    images that is held out for that; then it is fitted to all of them.

    Returns:
        (top-1 on the test images, chosen strength).
    """
    center, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    x, y = ((train - center) / scale).numpy(), train_labels.numpy()
    order = np.random.default_rng(seed).permutation(len(x))
    held, fitted = np.split(order, [max(1, len(x) // 10)])
    scores = [_fit(x[fitted], y[fitted], s).score(x[held], y[held]) for s in strengths]
    best = strengths[int(np.argmax(scores))]
    classifier = _fit(x, y, best)
    return float(classifier.score(((test - center) / scale).numpy(), test_labels.numpy())), best


def _fit(x: np.ndarray, y: np.ndarray, strength: float):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000).fit(x, y)
