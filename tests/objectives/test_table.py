"""Reading a recipe's objectives, their weighted sum, and what holds for every entry of the table."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.batch import CtcOutput, Outputs, TokenOutput
from polymodal.core.errors import ConfigError
from polymodal.core.passes import TokenPass, kind_of
from polymodal.objectives.infonce import InfoNCE
from polymodal.objectives.next_token import NextToken
from polymodal.objectives.table import OBJECTIVES, parse_objectives, weighted_losses

from .samples import batch_of, embedded


def full_outputs() -> Outputs:
    generator = torch.Generator().manual_seed(3)
    outputs = embedded(4)
    outputs.token_logits = torch.randn(6, 9, generator=generator).requires_grad_()
    outputs.token_targets = torch.tensor([1, 2, 3, 4, 5, 6])
    outputs.token_samples = torch.tensor([0, 0, 1, 2, 3, 3])
    outputs.match_logits = torch.randn(4, generator=generator).requires_grad_()
    outputs.class_logits = torch.randn(4, 2, generator=generator).requires_grad_()
    for vectors, _ in outputs.embeddings.values():
        vectors.requires_grad_()
    outputs.rebuilt = torch.randn(5, 7, generator=generator).requires_grad_()
    outputs.rebuilt_targets = torch.randn(5, 7, generator=generator)
    outputs.pair_logits = torch.randn(4, 4, generator=generator).requires_grad_()
    outputs.pair_samples = (torch.arange(4), torch.arange(4))
    letters = torch.randn(4, 20, 30, generator=generator).requires_grad_()
    owners = torch.arange(4)
    outputs.ctc = CtcOutput(letters, torch.full((4,), 20), owners, 0, lambda text: [ord(c) - 96 for c in text])
    return outputs


ELSEWHERE = {"distill", "ewc", "orthogonality"}
"""Objectives that need a teacher, an earlier stage or one encoder; their promises stand in files of their own."""


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ELSEWHERE])
def test_every_objective_gives_a_finite_scalar_with_a_gradient(name):
    data = {"use": name, "classes": ["match", "mismatch"]} if name == "classify" else {"use": name}
    config = OBJECTIVES.parse(data)
    outputs = full_outputs()
    if isinstance(config.needs, TokenPass):
        outputs.tokens[config.needs] = TokenOutput(outputs.token_logits, outputs.token_targets, outputs.token_samples)
    report = config(outputs, batch_of(4, ["match", "mismatch", "match", "mismatch"]))
    assert report.total.shape == () and torch.isfinite(report.total) and report.total.requires_grad
    assert report.count > 0
    assert kind_of(config.needs) in ("sequence", "embed", "merge", "ctc", "masked", "caption", "rebuild", "pairs")
    assert OBJECTIVES.parse(config.to_data()) == config


def test_parse_objectives_takes_a_number_a_mapping_and_a_name_of_its_own():
    found = parse_objectives(
        {
            "next_token": 1.0,
            "infonce": {"weight": 0.5, "pairs": [["image", "text"]]},
            "hub": {"use": "infonce", "pairs": [["image", "audio"]]},
        }
    )
    assert [(name, weight) for name, weight, _ in found] == [("next_token", 1.0), ("infonce", 0.5), ("hub", 1.0)]
    assert isinstance(found[0].config, NextToken)
    assert found[2].config == InfoNCE(pairs=(("image", "audio"),))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"next_tokn": 1.0}, "unknown objective 'next_tokn'; did you mean 'next_token'"),
        (
            {"next_token": 0},
            "objectives.next_token: found the weight 0, expected a number above 0; leave the",
        ),
        ({"next_token": "big"}, "found the weight 'big', expected a number above 0"),
        ({"next_token": float("nan")}, "found the weight nan"),
        ({"next_token": True}, "found the weight True"),
        ({}, r"objectives: found \{\}, expected at least one of: next_token, infonce, sigmoid_pairs, triplet"),
        ({"infonce": {"pair": []}}, "objectives.infonce.pair: unknown key 'pair'; did you mean 'pairs'"),
    ],
)
def test_messages(mapping, message):
    with pytest.raises(ConfigError, match=message):
        parse_objectives(mapping)


def test_weighted_sum_and_numbers_for_the_log():
    objectives = parse_objectives(
        {"next_token": 2.0, "infonce": 0.5, "absent": {"use": "infonce", "pairs": [["a", "b"]]}}
    )
    losses = weighted_losses(objectives, full_outputs(), batch_of(4))
    reports = losses.reports
    torch.testing.assert_close(
        losses.total.double(), 2.0 * reports["next_token"].total.double() + 0.5 * reports["infonce"].total
    )
    assert reports["absent"].count == 0
    assert set(losses.values()) == {"next_token", "next_token/text", "infonce", "infonce/image-text"}
    nothing = weighted_losses(objectives[2:], full_outputs(), batch_of(4))
    assert not nothing.total.requires_grad and nothing.values() == {}
