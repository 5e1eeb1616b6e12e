"""What every head promises, over every entry of the table, inside a composed model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, asked, build, decoder_data, joint_data, medium, merge_data, stream

from polymodal.core.batch import Outputs
from polymodal.core.parts import Text
from polymodal.core.passes import Pass, TokenPass
from polymodal.core.samples import Sample
from polymodal.models.heads.table import HEADS

CASES: list[dict[str, Any]] = [
    {"use": "next_token"},
    {"use": "next_token", "tied": False},
    {"use": "projection"},
    {"use": "projection", "dim": 8, "streams": ["image"], "temperature": 0.5, "bias": -10.0},
    {"use": "class", "classes": ["a", "b"]},
    {"use": "matching"},
    {"use": "matching", "outputs": 2, "pooler": True},
    {"use": "class", "classes": ["a", "b"], "hidden": 12},
    {"use": "projection", "streams": ["image"], "proj_bias": True},
    {"use": "masked_token"},
    {"use": "masked_token", "transform": False, "tied": False},
    {"use": "ctc", "stream": "image", "vocabulary": ["-", "|", "a", "b"]},
    {"use": "projection", "hidden": "relu"},
]
CAPTION = TokenPass("caption")
ELSEWHERE = {"masked_patches", "prompted_pairs", "query_token", "pooler"}
"""Heads of one kind of encoder or backbone alone; their promises stand in files of their own."""
PASSES: dict[str, Pass] = {
    "next_token": "sequence",
    "projection": "embed",
    "class": "merge",
    "matching": "match",
    "masked_token": CAPTION,
    "ctc": "ctc",
}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))


def toy_of(case: dict[str, Any], seed: int = 0) -> tuple[Toy, list[Sample]]:
    """A model that the head stands in, and samples that it takes."""
    views = [
        Sample(str(i), views={"image": medium("image", i), "text": Text(text)})
        for i, text in enumerate(["a red cube", "blue", "it falls"])
    ]
    if case["use"] == "next_token":
        data = decoder_data()
        data["heads"] = {"h": case}
        return build(data, seed=seed), [asked(0, "image"), asked(1), asked(2, "audio", "image")]
    if case["use"] in ("projection", "ctc"):
        data = {
            "streams": {name: stream(name, enters="none") for name in ("text", "image")},
            "backbone": "none",
            "heads": {"h": case},
        }
        return build(data, seed=seed), views
    if case["use"] == "masked_token":
        return build(joint_data(heads={"h": case}), seed=seed), views
    return build(merge_data(heads={"h": case}), seed=seed), views


def tensors(outputs: Outputs) -> dict[str, torch.Tensor]:
    """What the pass of a head filled, without what is drawn at random."""
    found = {name: getattr(outputs, name) for name in ("token_logits", "class_logits", "match_logits", "scale", "bias")}
    found |= {f"embeddings.{name}": vectors for name, (vectors, _) in outputs.embeddings.items()}
    found |= {} if outputs.ctc is None else {"ctc": outputs.ctc.logits}
    for token in outputs.tokens.values():
        found["predictions"] = token.predictions
    return {name: value for name, value in found.items() if value is not None}


def run(toy: Toy, samples: list[Sample], use: str) -> dict[str, torch.Tensor]:
    return tensors(toy.network(toy.batch(samples), (PASSES[use],)))


def test_every_head_of_the_table_is_here() -> None:
    assert {case["use"] for case in CASES} == set(HEADS) - ELSEWHERE == set(PASSES)


@cases
def test_its_pass_gives_finite_outputs_of_its_shape(case: dict[str, Any]) -> None:
    toy, samples = toy_of(case)
    found = run(toy, samples, case["use"])
    assert found and all(value.isfinite().all() for value in found.values())
    if case["use"] == "next_token":
        outputs = toy.network(toy.batch(samples))
        assert found["token_logits"].shape == (len(outputs.token_targets), toy.tokenizer.size)
        assert outputs.token_targets.shape == outputs.token_samples.shape
    elif case["use"] == "projection":
        names = case.get("streams", ["text", "image"])
        assert {name for name in found if name.startswith("emb")} == {f"embeddings.{name}" for name in names}
        assert all(found[f"embeddings.{name}"].shape == (3, case.get("dim", 128)) for name in names)
    elif case["use"] == "class":
        assert found["class_logits"].shape == (3, 2)
    elif case["use"] == "ctc":
        assert found["ctc"].shape == (3, 4, 4)
    elif case["use"] == "masked_token":
        assert found["predictions"].shape[1] == toy.tokenizer.size
    else:
        assert found["match_logits"].shape == (3,)
        assert toy.network(toy.batch(samples), ("match",)).mismatch_logits.shape == (3,)


@cases
def test_every_parameter_of_the_head_and_of_what_it_reads_gets_a_gradient(case: dict[str, Any]) -> None:
    toy, samples = toy_of(case)
    found = run(toy, samples, case["use"])
    generator = torch.Generator().manual_seed(1)
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in found.values()).backward()
    for name, parameter in toy.network.heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    read = case.get("streams", ["image"])
    for name in read:
        gradients = [p.grad for p in toy.network.streams[name].encoder.parameters()]
        assert any(grad is not None and bool(grad.any()) for grad in gradients)


@cases
def test_order_and_neighbours_do_not_matter(case: dict[str, Any]) -> None:
    toy, samples = toy_of(case)
    with torch.no_grad():
        together = run(toy, samples, case["use"])
        each = [run(toy, [sample], case["use"]) for sample in samples]
        for name, value in together.items():
            if name in ("scale", "bias"):
                assert all(torch.equal(one[name], value) for one in each)
                continue
            alone = torch.cat([one[name] for one in each])
            torch.testing.assert_close(alone, value, rtol=1e-5, atol=1e-5)
            if name not in ("token_logits", "predictions"):
                back = run(toy, samples[::-1], case["use"])[name].flip(0)
                torch.testing.assert_close(back, value, rtol=1e-5, atol=1e-5)


@cases
def test_config_and_weights_go_out_and_come_back(case: dict[str, Any]) -> None:
    config = HEADS.parse(case)
    assert HEADS.parse(config.to_data()) == config
    (toy, samples), (other, _) = toy_of(case), toy_of(case, seed=9)
    other.network.load_state_dict(toy.network.state_dict())
    expected = run(toy, samples, case["use"])
    for name, value in run(other, samples, case["use"]).items():
        assert torch.equal(value, expected[name]), name
