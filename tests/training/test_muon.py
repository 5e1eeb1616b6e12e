"""Muon by torch's own, by singular values, and by what it leaves to AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal.training.muon import matrices_of, orthogonal
from polymodal.training.optimizers import OPTIMIZERS


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 16)])
def test_orthogonal_brings_singular_values_near_one_and_keeps_directions(shape):
    x_NRC = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y_NRC = orthogonal(x_NRC)
    assert torch.linalg.svdvals(y_NRC).sub(0.95).abs().max() < 0.3
    left, _, right = torch.linalg.svd(x_NRC, full_matrices=False)
    # Left and right singular vectors stay: in their basis the result is diagonal.
    inner = left.mT @ y_NRC @ right.mT
    off_diagonal = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_steps_are_those_of_torch_with_its_adamw_scale(shape):
    torch.manual_seed(0)
    ours = nn.Linear(shape[1], shape[0], bias=False)
    reference = nn.Linear(shape[1], shape[0], bias=False)
    reference.load_state_dict(ours.state_dict())
    optimizer = OPTIMIZERS.parse({"use": "muon", "lr": 0.01, "weight_decay": 0.1}).build(ours)
    published = torch.optim.Muon(reference.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.weight.detach().clone()
    for _ in range(4):
        gradient = torch.randn(shape)
        for model, each in ((ours, optimizer), (reference, published)):
            model.weight.grad = gradient.clone()
            each.step()
    moved = (reference.weight - start).norm()
    # The published one multiplies in bfloat16 (8 bits of mantissa).
    assert (ours.weight - reference.weight).norm() < 0.03 * moved


def test_filters_are_matrices_and_embeddings_norms_and_biases_are_not():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "filters": nn.Conv2d(3, 4, 3),
            "inner": nn.Linear(4, 4),
            "tied": nn.Linear(4, 5, bias=False),
        }
    )
    model["tied"].weight = model["table"].weight
    model["query"] = nn.Identity()
    model.latents = nn.Parameter(torch.zeros(2, 4))
    assert matrices_of(model) == {id(model["filters"].weight), id(model["inner"].weight)}
    optimizer = OPTIMIZERS.parse({"use": "muon", "lr": 0.03, "lr_scale": {"inner": 0.5}}).build(model)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == pytest.approx(
        {
            "filters.weight": 0.03,
            "inner.weight": 0.015,
            "table.weight": 0.01,
            "norm.weight": 0.01,
            "norm.bias": 0.01,
            "filters.bias": 0.01,
            "inner.bias": 0.005,
            "latents": 0.01,
        }
    )


def test_an_explicit_rate_of_the_rest():
    model = nn.Linear(4, 4)
    optimizer = OPTIMIZERS.parse({"use": "muon", "lr": 0.02, "adamw_lr": 0.001}).build(model)
    assert {group["names"][0]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"weight": 0.02, "bias": 0.001}
    )
