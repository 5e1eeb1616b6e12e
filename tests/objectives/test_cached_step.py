"""Gradient caching gives the gradients of one pass over everything."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polymodal.core.batch import Batch, Outputs
from polymodal.objectives.cached_step import cached_contrastive_step, cached_objectives_step
from polymodal.objectives.infonce import infonce
from polymodal.objectives.pairing import Relation
from polymodal.objectives.table import parse_objectives, weighted_losses

from .samples import batch_of


class TwoTowers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.text = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, data):
        towers = {"image": self.image, "text": self.text}
        return {name: F.normalize(towers[name](x), dim=-1) for name, x in data.items()}


def micro_batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randn(n, 5, generator=generator), "text": torch.randn(n, 3, generator=generator)}
        for n in (4, 3, 1, 4)
    ]


def total(model, vectors):
    x = torch.cat([part["image"] for part in vectors])
    y = torch.cat([part["text"] for part in vectors])
    return infonce(x, y, model.log_scale.exp(), Relation(torch.arange(len(x))))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_equals_the_one_pass_gradient():
    cached, plain = TwoTowers(), TwoTowers()
    value = cached_contrastive_step(micro_batches(), cached, lambda vectors: total(cached, vectors))
    expected = total(plain, [plain(data) for data in micro_batches()])
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    assert gradients(cached).keys() == gradients(plain).keys() and "log_scale" in gradients(cached)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-5, atol=1e-6)


def test_dropout_is_drawn_the_same_in_both_passes():
    cached, plain = TwoTowers(0.5), TwoTowers(0.5)
    torch.manual_seed(7)
    cached_contrastive_step(micro_batches(), cached, lambda vectors: total(cached, vectors))
    after = torch.rand(1)
    torch.manual_seed(7)
    total(plain, [plain(data) for data in micro_batches()]).backward()
    assert torch.equal(after, torch.rand(1)), "the second pass leaves the random state alone"
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-5, atol=1e-6)


def test_no_more_than_one_micro_batch_has_a_graph():
    model, alive = TwoTowers(), []
    cached_contrastive_step(
        micro_batches(),
        lambda data: (alive.append(torch.is_grad_enabled()), model(data))[1],
        lambda vectors: total(model, vectors),
    )
    assert alive == [False] * 4 + [True] * 4


def forward(model: TwoTowers, batch: Batch) -> Outputs:
    """Every sample has an image; those whose label is not 'mute' have a text."""
    index = torch.tensor([int(name[1:]) for name in batch.sample_ids])
    torch.manual_seed(0)
    images, texts = torch.randn(20, 5)[index], torch.randn(20, 3)[index]
    spoken = torch.tensor([label != "mute" for label in batch.labels])
    data = {"image": images} if not spoken.any() else {"image": images, "text": texts[spoken]}
    owners = torch.arange(len(index))
    vectors = model(data)
    embeddings = {name: (x, owners if name == "image" else owners[spoken]) for name, x in vectors.items()}
    return Outputs(embeddings=embeddings, scale=model.log_scale.exp(), bias=model.bias)


@pytest.mark.parametrize("objective", [{"infonce": {"same_label": "skip"}}, {"sigmoid_pairs": 2.0, "triplet": 1.0}])
def test_objectives_over_several_batches_equal_one_batch(objective):
    labels = ["a", "mute", "b", "a", "mute", "c", "a", "b"]
    whole = batch_of(8, labels)
    parts = [copy.copy(whole) for _ in range(3)]
    for part, (start, end) in zip(parts, [(0, 4), (4, 5), (5, 8)], strict=True):
        part.sample_ids, part.labels = whole.sample_ids[start:end], whole.labels[start:end]
        part.modalities = whole.modalities[start:end]
    objectives = parse_objectives(objective)
    cached, plain = TwoTowers(), TwoTowers()
    losses = cached_objectives_step(
        parts, lambda batch: forward(cached, batch), objectives, lambda: (cached.log_scale.exp(), cached.bias)
    )
    expected = weighted_losses(objectives, forward(plain, whole), whole)
    expected.total.backward()
    torch.testing.assert_close(losses.total, expected.total, rtol=1e-5, atol=1e-6)
    assert [r.count for r in losses.reports.values()] == [r.count for r in expected.reports.values()]
    assert gradients(cached).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-5, atol=1e-6)


def test_nothing_to_compare_gives_no_gradient():
    model = TwoTowers()
    batch = batch_of(3, ["mute"] * 3)
    losses = cached_objectives_step(
        [batch], lambda b: forward(model, b), parse_objectives({"infonce": 1.0}), lambda: (model.log_scale.exp(), None)
    )
    assert losses.reports["infonce"].count == 0 and gradients(model) == {}
