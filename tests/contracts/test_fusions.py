"""What every fusion promises, over every entry of the table: a new fusion is tested by existing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_reach_all_but_frozen
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.entries.fusions import FUSIONS, WeightedFusion

VARIANTS: list[dict[str, Any]] = [
    {"use": "concat", "axis": "sequence"},
    {"use": "concat", "axis": "sequence", "depth": 2, "heads": 2},
    {"use": "cross_attention", "num_queries": 1, "depth": 1},
    {"use": "cross_attention", "query": "image"},
]
REQUIRED: dict[str, dict[str, Any]] = {"concat": {"axis": "feature"}}
CASES = [{"use": name, **REQUIRED.get(name, {})} for name in FUSIONS] + VARIANTS
STREAMS = ("text", "image", "audio")
COUNTS = {"text": (3, 1, 0, 2), "image": (2, 2, 4, 1), "audio": (0, 1, 1, 0)}
WIDTH, SAMPLES = 16, 4

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))


def make(case: dict[str, Any], streams: tuple[str, ...] = STREAMS) -> nn.Module:
    torch.manual_seed(0)
    return FUSIONS.parse(case).build(streams, WIDTH).eval()


def tokens(extra: int = 0, fill: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ragged tokens of every stream; sample 2 has no text, samples 0 and 3 no audio; every sample has an image."""
    generator = torch.Generator().manual_seed(1)
    values, valid = {}, {}
    for name in STREAMS:
        longest = max(COUNTS[name])
        content = torch.randn(SAMPLES, longest, WIDTH, generator=generator)
        values[name] = torch.full((SAMPLES, longest + extra, WIDTH), fill)
        valid[name] = torch.zeros(SAMPLES, longest + extra, dtype=torch.bool)
        for row, count in enumerate(COUNTS[name]):
            values[name][row, :count], valid[name][row, :count] = content[row, :count], True
    return values, valid


def rows(batch: tuple[dict[str, Tensor], dict[str, Tensor]], index: list[int]) -> tuple[Any, Any]:
    return tuple({name: value[index] for name, value in part.items()} for part in batch)  # type: ignore[return-value]


@cases
def test_one_finite_state_per_sample(case: dict[str, Any]) -> None:
    state = make(case)(*tokens())
    assert state.shape == (SAMPLES, WIDTH)
    assert state.isfinite().all()
    assert torch.pdist(state).min() > 1e-4


@cases
def test_padding_order_and_neighbours_do_not_matter(case: dict[str, Any]) -> None:
    fusion = make(case)
    with torch.no_grad():
        expected = fusion(*tokens())
        padded = fusion(*tokens(extra=3, fill=50.0))
        backwards = fusion(*rows(tokens(), [3, 2, 1, 0])).flip(0)
        alone = torch.cat([fusion(*rows(tokens(), [row])) for row in range(SAMPLES)])
    for found in (padded, backwards, alone):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@cases
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(case: dict[str, Any]) -> None:
    fusion = make(case).train()

    def backward() -> None:
        state = fusion(*tokens())
        (state * torch.randn(state.shape, generator=torch.Generator().manual_seed(2))).sum().backward()

    assert_reach_all_but_frozen(fusion, backward)


@cases
def test_gradients_reach_exactly_the_valid_tokens(case: dict[str, Any]) -> None:
    values, valid = tokens(extra=1)
    leaves = {name: value.requires_grad_(True) for name, value in values.items()}
    state = make(case)(leaves, valid)
    (state * torch.randn(state.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name in STREAMS:
        assert torch.equal(leaves[name].grad.abs().sum(-1) > 0, valid[name]), name


@cases
def test_what_stands_in_an_absent_stream_is_never_read(case: dict[str, Any]) -> None:
    """A sample that lacks a stream has the state that it would have without any column for it."""
    fusion = make(case)
    values, valid = rows(tokens(), [0, 3])
    shorter = {**values, "audio": values["audio"][:, :1] * 0}, {**valid, "audio": valid["audio"][:, :1]}
    loud = {**values, "audio": values["audio"] + 100.0}, valid
    with torch.no_grad():
        expected = fusion(values, valid)
        torch.testing.assert_close(fusion(*shorter), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fusion(*loud), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["use"] not in ("gated", "dynamic") and case.get("axis") != "feature"],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_an_absent_stream_equals_the_model_without_it(case: dict[str, Any]) -> None:
    """Where no weight has a fixed place for every stream, the smaller fusion with the same weights gives the same."""
    whole, part = make(case), make(case, STREAMS[:2])
    weights = whole.state_dict()
    kept = {name: weights[name] for name in part.state_dict() if name != "stream_embeddings"}
    if "stream_embeddings" in weights:
        kept["stream_embeddings"] = weights["stream_embeddings"][: len(part.state_dict()["stream_embeddings"])]
    part.load_state_dict(kept)
    values, valid = rows(tokens(), [0, 3])
    with torch.no_grad():
        expected = part({n: values[n] for n in STREAMS[:2]}, {n: valid[n] for n in STREAMS[:2]})
        torch.testing.assert_close(whole(values, valid), expected, rtol=1e-5, atol=1e-5)


@cases
def test_a_sample_without_anything_is_finite(case: dict[str, Any]) -> None:
    values, valid = tokens()
    nothing = {name: torch.zeros_like(mask) for name, mask in valid.items()}
    state = make(case)(values, nothing)
    assert state.isfinite().all()
    state.sum().backward()


@cases
def test_config_and_weights_go_out_and_come_back(case: dict[str, Any]) -> None:
    config = FUSIONS.parse(case)
    again = FUSIONS.parse(config.to_data())
    assert again == config
    fusion = make(case)
    torch.manual_seed(5)
    copy = again.build(STREAMS, WIDTH).eval()
    copy.load_state_dict(fusion.state_dict())
    assert torch.equal(copy(*tokens()), fusion(*tokens()))


@pytest.mark.parametrize("use", ["gated", "dynamic"])
def test_weights_sum_to_one_over_the_streams_that_are_there(use: str) -> None:
    fusion = make({"use": use})
    assert isinstance(fusion, WeightedFusion)
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    weights = fusion.weights(torch.randn(3, 3, WIDTH), present)
    assert weights.shape == (3, 3, WIDTH if use == "gated" else 1)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    assert not weights[~present].any()
    torch.testing.assert_close(weights[2, 1], torch.ones_like(weights[2, 1]))


def test_a_sum_is_additive_and_a_product_is_not() -> None:
    """The difference that changing one stream makes does not depend on the other, for a sum alone."""
    generator = torch.Generator().manual_seed(0)
    a1, a2, b1, b2 = torch.randn(4, 1, 1, WIDTH, generator=generator)
    ones = torch.ones(1, 1, dtype=torch.bool)
    for use, is_additive in (("sum", True), ("product", False)):
        fusion = make({"use": use}, ("a", "b"))

        def state(a: Tensor, b: Tensor, fusion: nn.Module = fusion) -> Tensor:
            return fusion({"a": a, "b": b}, {"a": ones, "b": ones})

        interaction = state(a1, b1) - state(a1, b2) - state(a2, b1) + state(a2, b2)
        assert torch.allclose(interaction, torch.zeros(1), atol=1e-5) == is_additive


def test_cross_attention_over_a_single_key_is_refused() -> None:
    config = FUSIONS.parse({"use": "cross_attention", "query": "text"})
    with pytest.raises(ConfigError, match=r"the keys are \['image: pooled'\], expected at least two"):
        config.check({"text": "tokens", "image": "pooled"})
    with pytest.raises(ConfigError, match="attention over a single key ignores its query"):
        config.check({"text": "tokens"})
    with pytest.raises(ConfigError, match=r"query is 'text', expected 'learned' or one of \['image'\]"):
        config.check({"image": "tokens"})
    config.check({"text": "pooled", "image": "tokens"})
    config.check({"text": "pooled", "image": "pooled", "audio": "pooled"})
    FUSIONS.parse("cross_attention").check({"text": "pooled", "image": "pooled"})


def test_an_unknown_fusion_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown fusion 'gatd'; did you mean 'gated'\? Valid: sum, concat"):
        FUSIONS.parse("gatd")
    with pytest.raises(ConfigError, match="axis: this key is required"):
        FUSIONS.parse("concat")
