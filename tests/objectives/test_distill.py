"""Distillation against the equations, and what cannot be compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from polymodal.core.batch import Outputs
from polymodal.core.errors import ConfigError
from polymodal.objectives.distill import Distill, divergence, teachers_of
from polymodal.objectives.table import parse_objectives


class Samples:
    num_samples = 4
    is_supervised = torch.ones(1, 5, dtype=torch.bool)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(width, seed):
    return {"image": (F.normalize(draw(4, width, seed=seed), dim=1), torch.arange(4))}


def run(config, mine, theirs):
    mine.teachers["t"] = theirs
    return Distill(teacher="t", **config)(mine, Samples())


def test_logits_are_the_softened_divergence():
    mine, theirs = draw(5, 7), draw(5, 7, seed=1)
    p, q = F.softmax(theirs / 2, 1), F.softmax(mine / 2, 1)
    expected = 4.0 * (p * (p / q).log()).sum(1).mean()
    report = run({"temperature": 2.0}, Outputs(token_logits=mine), Outputs(token_logits=theirs))
    torch.testing.assert_close(report.total, expected)
    assert report.count == 5
    merged = run({"temperature": 2.0, "on": "merge"}, Outputs(class_logits=mine), Outputs(class_logits=theirs))
    torch.testing.assert_close(merged.total, expected)
    assert run({}, Outputs(token_logits=mine), Outputs(token_logits=mine)).total.abs() < 1e-6


def test_features_are_the_squared_distance():
    mine, theirs = vectors(6, 0), vectors(6, 1)
    report = run({"match": "features"}, Outputs(embeddings=mine), Outputs(embeddings=theirs))
    expected = (mine["image"][0] - theirs["image"][0]).square().sum(1).mean()
    torch.testing.assert_close(report.total, expected)
    torch.testing.assert_close(report.parts["image"], expected)


def test_similarity_compares_neighbours_at_any_width():
    mine, theirs = vectors(6, 0), vectors(3, 1)
    report = run({"match": "similarity", "temperature": 0.5}, Outputs(embeddings=mine), Outputs(embeddings=theirs))
    rows = []
    for x in (mine["image"][0], theirs["image"][0]):
        cosines = x @ x.T / 0.5
        rows.append(torch.stack([torch.cat((row[:i], row[i + 1 :])) for i, row in enumerate(cosines)]))
    torch.testing.assert_close(report.total, divergence(rows[0], rows[1], 1.0))
    turned = {"image": (mine["image"][0] @ torch.linalg.qr(draw(6, 6))[0], torch.arange(4))}
    assert run({"match": "similarity"}, Outputs(embeddings=mine), Outputs(embeddings=turned)).total.abs() < 1e-6


def test_gradients_reach_the_model_alone():
    mine, theirs = draw(5, 7).requires_grad_(), draw(5, 7, seed=1).requires_grad_()
    run({}, Outputs(token_logits=mine), Outputs(token_logits=theirs)).total.backward()
    assert mine.grad is not None and theirs.grad is None


def test_teachers_and_their_passes():
    found = teachers_of(
        parse_objectives(
            {
                "next_token": 1.0,
                "logits": {"use": "distill", "teacher": "a", "weight": 0.5},
                "likeness": {"use": "distill", "teacher": "a", "match": "similarity"},
            }
        )
    )
    assert found == {"a": {"sequence", "embed"}}


def test_messages():
    with pytest.raises(ConfigError, match="match: logits compares sequence or merge, not embed"):
        Distill.parse({"use": "distill", "teacher": "t", "on": "embed"})
    with pytest.raises(ConfigError, match="match: features has none, leave it out"):
        Distill.parse({"use": "distill", "teacher": "t", "match": "features", "temperature": 2.0})
    with pytest.raises(ConfigError, match="no teacher was opened for 't'"):
        Distill(teacher="t")(Outputs(), Samples())
    with pytest.raises(ConfigError, match=r"found logits \(5, 7\), the teacher's are \(5, 8\); expected the same voc"):
        run({}, Outputs(token_logits=draw(5, 7)), Outputs(token_logits=draw(5, 8)))
    with pytest.raises(ConfigError, match="vectors of width 6, the teacher's have 3; expected the same, or match: sim"):
        run({"match": "features"}, Outputs(embeddings=vectors(6, 0)), Outputs(embeddings=vectors(3, 0)))
    with pytest.raises(ConfigError, match="sequence gives no logits in the model or in the teacher"):
        run({}, Outputs(), Outputs())
