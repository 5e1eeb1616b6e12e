"""The penalty of PointNet's feature alignment as an objective of a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from toys import Toy, build, medium

from polymodal.core.errors import ConfigError
from polymodal.core.samples import Sample
from polymodal.objectives.orthogonality import Orthogonality
from polymodal.objectives.table import OBJECTIVES, parse_objectives, passes_of, weighted_losses

ALIGNED = {"use": "pointnet_aligned", "width": 16, "first": [8], "second": [16], "whole": [], "colour": True}


def made(**changes: Any) -> Toy:
    streams = {
        "points": {"modality": "points", "encoder": {**ALIGNED, **changes}, "enters": "merge"},
        "image": toys.stream("image", enters="merge"),
    }
    head = {"class": {"use": "class", "classes": ["a", "b"]}}
    return build({"streams": streams, "backbone": {"use": "merge", "width": 16}, "heads": head})


def views(*names: str, label: str = "a") -> list[Sample]:
    return [Sample(str(i), views={name: medium(name, seed=i) for name in names}, label=label) for i in range(3)]


def test_it_is_the_published_penalty_and_reaches_the_alignment_alone() -> None:
    toy = made()
    encoder = toy.network.modules_of("points").encoder
    said: list[torch.Tensor] = []
    encoder.feature_alignment.register_forward_hook(lambda _m, _i, out: said.append(out.detach()))
    objectives = parse_objectives({"classify": {"classes": ["a", "b"]}, "orthogonality": 0.001})
    batch = toy.batch(views("points", "image"))
    outputs = toy.network(batch, passes_of(objectives))
    losses = weighted_losses(objectives, outputs, batch)
    expected = sum(((torch.eye(8) - a @ a.T) ** 2).sum() for a in said[0]) / 3
    report = losses.reports["orthogonality"]
    torch.testing.assert_close(report.total, expected)
    assert report.count == Orthogonality().count(batch) == 3
    torch.testing.assert_close(losses.total, losses.reports["classify"].total + 0.001 * expected)
    report.total.backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert "feature_alignment.matrix.weight" in reached and not any(name.startswith("second") for name in reached)


def test_nothing_is_added_where_there_are_no_points_and_no_alignment_is_named() -> None:
    toy, objective = made(), Orthogonality()
    batch = toy.batch(views("image"))
    report = objective(toy.network(batch, ("merge",)), batch)
    assert report.count == 0 and not report.total.requires_grad and objective.count(batch) == 0
    plain = made(align=False)
    batch = plain.batch(views("points"))
    with pytest.raises(
        ConfigError, match="found no alignment in stream 'points', expected the encoder pointnet_aligned"
    ):
        objective(plain.network(batch, ("merge",)), batch)
    assert OBJECTIVES.parse({"use": "orthogonality", "stream": "points"}).needs is None
