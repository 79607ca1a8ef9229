"""Probes of frozen features, against brute force and on clusters whose answer is known."""

import torch
import torch.nn.functional as F

from pretrain.objectives.probing import knn_top1, linear_top1


def clusters(count: int, seed: int, spread: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.eye(4)
    labels = torch.arange(count) % 4
    return centers[labels] + spread * torch.randn(count, 4, generator=generator), labels


def test_neighbours_vote_with_their_similarity():
    (train, labels), (test, wanted) = clusters(40, 0, 1.0), clusters(30, 1, 1.0)
    hits = 0
    for row, label in zip(test, wanted, strict=True):
        similarity = F.cosine_similarity(row[None], train)
        votes = [0.0] * 4
        for place in similarity.argsort(descending=True)[:7].tolist():
            votes[int(labels[place])] += float((similarity[place] / 0.1).exp())
        hits += max(range(4), key=votes.__getitem__) == int(label)
    found = knn_top1(train, labels, test, wanted, neighbours=7, temperature=0.1)
    assert found == hits / 30 and 0.25 < found < 1


def test_more_neighbours_than_images():
    train, labels = clusters(6, 0)
    assert knn_top1(train, labels, train, labels, neighbours=100) == 1.0


def test_a_linear_classifier_parts_what_is_linear_and_chance_is_chance():
    (train, labels), (test, wanted) = clusters(400, 0), clusters(200, 1)
    top1, strength = linear_top1(train, labels, test, wanted)
    assert top1 > 0.97 and strength in (0.01, 0.1, 1.0, 10.0)
    shuffled = wanted[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert linear_top1(train, labels, test, shuffled)[0] < 0.45
