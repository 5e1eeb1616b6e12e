"""Options of the stack that language models need: windows, stretched rotary codes, offsets, narrow embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.layers import Layout, RopeScaling, Transformer, TransformerConfig
from polymodal.models.layers.positions import rope_tables

SMALL = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "rope_theta": 100.0, "norm": "rms", "bias": False}


def stack(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig.parse({**SMALL, **options})).eval()


def test_a_window_hides_what_is_further_back_and_nothing_else() -> None:
    model = stack(window=3, depth=1)
    x = torch.randn(1, 8, 16)
    changed = x.clone()
    changed[:, 2] += 1.0
    with torch.no_grad():
        moved = (model(x, Layout.padded(None, True)) - model(changed, Layout.padded(None, True))).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False, False, True, True, True, False, False, False]


def test_a_window_is_the_same_padded_packed_and_cached() -> None:
    model, lengths = stack(window=4), (9, 3, 7)
    rows = [torch.randn(length, 16) for length in lengths]
    with torch.no_grad():
        alone = [model(row[None], Layout.padded(None, True))[0] for row in rows]
        packed = model(torch.cat(rows)[None], Layout.packed(lengths, True))[0].split(lengths)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        is_valid = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
        batch = model(padded, Layout.padded(is_valid, True))
        cache = model.new_cache(1, 9)
        steps = [model(rows[0][None, :5], Layout.padded(None, True), cache)]
        steps += [model(rows[0][None, place : place + 1], Layout.padded(None, True), cache) for place in range(5, 9)]
        ragged = model.new_cache(3, 12)
        first = model(padded[:, :6], Layout.padded(is_valid[:, :6], True), ragged)
        more = model(torch.stack([rows[0][6:8], rows[1][:2], rows[2][:2]]), Layout.padded(None, True), ragged)
    for row, (found, in_pack) in enumerate(zip(batch, packed, strict=True)):
        torch.testing.assert_close(in_pack, alone[row])
        torch.testing.assert_close(found[: lengths[row]], alone[row])
    torch.testing.assert_close(torch.cat(steps, 1)[0], alone[0])
    torch.testing.assert_close(torch.cat((first[0], more[0])), alone[0][:8])


def test_a_window_as_long_as_the_text_changes_nothing() -> None:
    x, layout = torch.randn(2, 6, 16), Layout.padded(None, True)
    with torch.no_grad():
        assert torch.equal(stack(window=6)(x, layout), stack()(x, layout))
    with pytest.raises(ConfigError, match="found a bidirectional layout, expected a causal one: this"):
        stack(window=2)(x, Layout.padded(None, False))


def test_linear_scaling_is_reading_at_smaller_steps() -> None:
    positions = torch.arange(8)[None]
    scaled = rope_tables(positions, 8, 100.0, torch.float32, RopeScaling(kind="linear", factor=2.0))
    halved = rope_tables(positions / 2, 8, 100.0, torch.float32)
    torch.testing.assert_close(scaled, halved)


def test_llama3_scaling_keeps_fast_rates_and_slows_the_others() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_tokens=64)
    turns = torch.tensor([8.0, 4.0, 2.5, 1.0, 0.5])
    rates = turns * 2 * torch.pi / 64
    # 2.5 turns lie half way between 1 and 4: the mean of the kept and the slowed rate.
    expected = torch.tensor([1.0, 1.0, (1 + 1 / 8) / 2, 1 / 8, 1 / 8])
    torch.testing.assert_close(scaling.slow(rates) / rates, expected)


def test_options_that_contradict_each_other_are_refused() -> None:
    for options, message in (
        ({"rope_theta": None, "rope_scaling": {"kind": "linear", "factor": 2.0}}, "rope_scaling without a rotary code"),
        ({"window": 4, "relative_buckets": 8, "kv_heads": 4}, "both relative positions and window 4, expected one"),
    ):
        with pytest.raises(ConfigError, match=message):
            TransformerConfig.parse({**SMALL, **options})
    with pytest.raises(ConfigError, match="position_offset belongs to positions: learned"):
        DecoderConfig.parse({"position_offset": 2})


def test_an_offset_leaves_the_first_rows_of_the_table_alone() -> None:
    config = {"positions": "learned", "max_tokens": 4, "transformer": {"width": 8, "depth": 1, "heads": 2}}
    plain, offset = (DecoderConfig.parse({**config, "position_offset": rows}).build(5) for rows in (0, 2))
    assert offset.embed_positions is not None and plain.embed_positions is not None
    assert len(offset.embed_positions.weight) == 6
    state = plain.state_dict()
    table = torch.full((6, 8), torch.nan)
    table[2:] = state["embed_positions.weight"]
    offset.load_state_dict({**state, "embed_positions.weight": table})
    ids = torch.tensor([[0, 1, 2, 3]])
    layout = Layout.padded(None, True, torch.arange(4)[None])
    with torch.no_grad():
        assert torch.equal(plain(plain.embed(ids), layout), offset(offset.embed(ids), layout))


def test_a_narrow_embedding_is_mapped_on_both_sides() -> None:
    config = DecoderConfig.parse({"embed_width": 6, "transformer": {"width": 8, "depth": 1, "heads": 2}})
    decoder = config.build(5)
    x = decoder.embed(torch.tensor([[0, 1, 2]]))
    assert x.shape == (1, 3, 8) and config.width == 8, "media tokens have the width of the stack"
    assert decoder(x, Layout.padded(None, True, torch.arange(3)[None])).shape == (1, 3, 6)
    assert decoder.embed_tokens.weight.shape == (5, 6)


def test_resolved_configs_say_what_defaults_mean() -> None:
    short = TransformerConfig.parse({"width": 16, "heads": 4})
    long = {"kv_heads": 4, "head_dim": 4, "mlp_dim": 64, "qkv_bias": True, "key_bias": True}
    assert short.resolved() == TransformerConfig.parse({"width": 16, "heads": 4, **long})
    assert short.resolved() == short.resolved().resolved()


@pytest.mark.parametrize("window_from", [0, 1, 2])
def test_blocks_before_window_from_see_everything(window_from: int) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=16, depth=2, heads=2, rope_theta=100.0, window=3, window_from=window_from)
    stack, x = Transformer(config).eval(), torch.randn(1, 9, 16)
    reach = []
    for first in range(9):
        moved = x.clone()
        moved[0, first] = -moved[0, first]
        with torch.no_grad():
            layout = Layout.padded(None, causal=True)
            differs = (stack(moved, layout) - stack(x, layout)).abs().amax(-1)[0] > 1e-6
        reach.append(int(differs.nonzero().max()) - first)
    # Two windows of 3 reach 4 tokens on; one block that sees everything reaches the end.
    assert max(reach) == (4 if window_from == 0 else 8)
    cache = stack.new_cache(1, 9)
    with torch.no_grad():
        parts = [stack(x[:, :4], Layout(causal=True), cache)] + [
            stack(x[:, i : i + 1], Layout(causal=True), cache) for i in range(4, 9)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), stack(x, Layout.padded(None, causal=True)))
        packed = stack(torch.cat((x, x[:, :5]), 1), Layout.packed((9, 5), causal=True))
        torch.testing.assert_close(packed[:, :9], stack(x, Layout.padded(None, causal=True)))


def test_long_factors_serve_texts_beyond_the_original_length() -> None:
    factors = {"short_factors": (1.0, 1.0, 1.0, 1.0), "long_factors": (2.0, 2.0, 2.0, 2.0)}
    scaling = RopeScaling(kind="longrope", factor=4.0, original_max_tokens=6, attention_factor=1.5, **factors)
    plain = rope_tables(torch.arange(12)[None] / 2, 8, 100.0, torch.float32)
    for length, expected in ((6, rope_tables(torch.arange(6)[None], 8, 100.0, torch.float32)), (12, plain)):
        found = rope_tables(torch.arange(length)[None], 8, 100.0, torch.float32, scaling)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other * 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"kind": "longrope", "factor": 2.0}}, "found 0 short_factors and 0 long_factors"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0, "beta_fast": 8.0}}, "beta_fast: found for kind 'linear'"),
        (
            {"rope_scaling": {"kind": "longrope", "factor": 2, "short_factors": [1.0], "long_factors": [1.0]}},
            "found 1 factors, expected 4",
        ),
        ({"window_from": 1}, "found window_from 1 without a window"),
    ],
)
def test_scaling_and_windows_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformerConfig.parse({"width": 16, "depth": 2, "heads": 2, "rope_theta": 100.0, **changes})
