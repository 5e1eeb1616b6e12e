"""What every backbone promises, over every entry of the table, inside a composed model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, asked, build, decoder_data, medium, merge_data, stream

from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.models.backbones.table import BACKBONES
from polymodal.models.compose import ModelConfig

CASES: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {}),
    ("decoder", {"positions": "learned"}),
    ("decoder", {"transformer": {"width": 16, "depth": 1, "heads": 2, "pre_norm": False, "qk_norm": True}}),
    ("merge", {}),
    ("merge", {"take": "tokens", "missing": "learned"}),
    ("none", {}),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def toy_of(case: tuple[str, dict[str, Any]], seed: int = 0) -> tuple[Toy, list[Sample]]:
    use, changes = case
    if use == "decoder":
        samples = [asked(0, "image", "audio", "video", "points", "sensor"), asked(1), asked(2, "image")]
        return build(decoder_data(**changes), seed=seed), samples
    views = [
        Sample("a", views={"image": medium("image", 0), "text": Text("a red cube"), "audio": medium("audio", 0)}),
        Sample("b", views={"audio": medium("audio", 1)}),
        Sample("c", views={"text": Text("blue"), "image": medium("image", 2)}),
    ]
    if use == "merge":
        return build(merge_data(**changes), seed=seed), views
    data = {
        "streams": {name: stream(name, enters="none") for name in ("text", "image", "audio")},
        "backbone": "none",
        "heads": {"space": {"use": "projection", "dim": 8}},
    }
    return build(data, seed=seed), views


def result(toy: Toy, samples: list[Sample]) -> list[torch.Tensor]:
    """Per sample, everything that the model says of it, in one vector."""
    use = toy.config.backbone.use
    outputs = toy.network(toy.batch(samples), ({"decoder": "sequence", "merge": "merge", "none": "embed"}[use],))
    if use == "merge":
        return list(outputs.merged)
    if use == "decoder":
        return [outputs.token_logits[outputs.token_samples == row].flatten() for row in range(len(samples))]
    return [
        torch.cat([vectors[owners == row].flatten() for _, (vectors, owners) in sorted(outputs.embeddings.items())])
        for row in range(len(samples))
    ]


def test_every_backbone_of_the_table_is_here() -> None:
    assert {use for use, _ in CASES} == set(BACKBONES)


@cases
def test_neighbours_and_order_do_not_matter(case: tuple[str, dict[str, Any]]) -> None:
    toy, samples = toy_of(case)
    with torch.no_grad():
        together = result(toy, samples)
        backwards = result(toy, samples[::-1])[::-1]
        for row, sample in enumerate(samples):
            torch.testing.assert_close(result(toy, [sample])[0], together[row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(backwards[row], together[row], rtol=1e-5, atol=1e-5)


@cases
def test_every_trainable_parameter_learns_and_no_frozen_one(case: tuple[str, dict[str, Any]]) -> None:
    toy, samples = toy_of(case)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator) for value in result(toy, samples)]

    def backward() -> None:
        sum((value * w).sum() for value, w in zip(result(toy, samples), weights, strict=True)).backward()

    backward()
    # Class head and temperature are read by other passes; a key's bias has a true gradient of zero.
    unread = ("heads.class", "heads.space.log_scale", "heads.space.bias")
    for name, parameter in toy.network.named_parameters():
        if name.startswith(unread):
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name
    toy.network.zero_grad(set_to_none=True)
    frozen = [p for name, p in toy.network.named_parameters() if name.startswith("streams")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    backward()
    assert all(parameter.grad is None for parameter in frozen)


@cases
def test_config_and_weights_go_out_and_come_back(case: tuple[str, dict[str, Any]]) -> None:
    (toy, samples), (other, _) = toy_of(case), toy_of(case, seed=9)
    assert ModelConfig.parse(toy.config.to_data()) == toy.config
    other.network.load_state_dict(toy.network.state_dict())
    for found, expected in zip(result(other, samples), result(toy, samples), strict=True):
        assert torch.equal(found, expected)
