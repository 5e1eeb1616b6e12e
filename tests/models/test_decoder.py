"""The decoder backbone: positions, packed against padded, cached against uncached, and where targets are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import Decoder, DecoderConfig, batch_layout, supervised_index
from polymodal.models.backbones.table import BACKBONES
from polymodal.models.layers.layout import Layout

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "norm": "rms"}


def make(positions: str = "rope", **changes: Any) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig.parse({"transformer": SMALL, "positions": positions, "max_tokens": 32, **changes})
    return config.build(50).eval()


def batch_of(ids: list[list[int]], targets: list[list[bool]], *, packed: bool) -> Batch:
    longest = max(map(len, ids))
    lengths = tuple(map(len, ids))
    if packed:
        rows = [[id for row in ids for id in row]]
        flags = [[flag for row in targets for flag in row]]
        valid = [[True] * len(rows[0])]
        positions = [[place for row in ids for place in range(len(row))]]
    else:
        rows = [row + [0] * (longest - len(row)) for row in ids]
        flags = [row + [False] * (longest - len(row)) for row in targets]
        valid = [[True] * len(row) + [False] * (longest - len(row)) for row in ids]
        positions = [list(range(longest)) for _ in ids]
    return Batch(
        torch.tensor(rows), torch.tensor(flags), torch.tensor(valid), torch.tensor(positions),
        lengths if packed else None, {}, [str(i) for i in range(len(ids))], [None] * len(ids), [()] * len(ids),
    )  # fmt: skip


def test_targets_of_the_worked_example() -> None:
    ids, flags = [[11, 12, 13], [14, 15]], [[False, False, True], [False, True]]
    source, targets, samples = supervised_index(batch_of(ids, flags, packed=True))
    assert (source.tolist(), targets.tolist(), samples.tolist()) == ([1, 3], [13, 15], [0, 1])
    source, targets, samples = supervised_index(batch_of(ids, flags, packed=False))
    assert (source.tolist(), targets.tolist(), samples.tolist()) == ([1, 3], [13, 15], [0, 1])


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_packed_rows_equal_padded_rows_equal_rows_alone(positions: str) -> None:
    decoder = make(positions)
    ids = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    flags = [[False] * len(row) for row in ids]
    with torch.no_grad():
        padded = batch_of(ids, flags, packed=False)
        rows = decoder(decoder.embed(padded.ids), batch_layout(padded))
        packed = batch_of(ids, flags, packed=True)
        together = decoder(decoder.embed(packed.ids), batch_layout(packed))[0].split([5, 2, 4])
        for row, alone_ids in enumerate(ids):
            alone = batch_of([alone_ids], [flags[row]], packed=False)
            expected = decoder(decoder.embed(alone.ids), batch_layout(alone))[0]
            torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rows[row, : len(alone_ids)], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_no_token_sees_a_later_one(positions: str) -> None:
    decoder = make(positions)
    ids = torch.arange(1, 9)[None]
    other = ids.clone()
    other[0, 5:] = 40
    layout = Layout(causal=True, positions_BT=torch.arange(8)[None])
    with torch.no_grad():
        one, two = (decoder(decoder.embed(rows), layout)[0] for rows in (ids, other))
    assert torch.equal(one[:5], two[:5])
    assert not torch.allclose(one[5:], two[5:])


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_cached_steps_equal_one_full_pass_for_rows_of_different_lengths(positions: str) -> None:
    decoder = make(positions)
    prompts, more = [[1, 2, 3, 4, 5], [6, 7]], [[21, 22, 23], [24, 25, 26]]
    flags = [[False] * len(row) for row in prompts]
    with torch.no_grad():
        cache = decoder.transformer.new_cache(2, 8)
        batch = batch_of(prompts, flags, packed=False)
        decoder(decoder.embed(batch.ids), batch_layout(batch), cache)
        steps = []
        for step in range(3):
            ids = torch.tensor([[row[step]] for row in more])
            layout = Layout(causal=True, positions_BT=cache.lengths_B[:, None])
            steps.append(decoder(decoder.embed(ids), layout, cache)[:, 0])
        for row in range(2):
            whole = torch.tensor([prompts[row] + more[row]])
            layout = Layout(causal=True, positions_BT=torch.arange(whole.shape[1])[None])
            expected = decoder(decoder.embed(whole), layout)[0, len(prompts[row]) :]
            torch.testing.assert_close(torch.stack(steps)[:, row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_order_matters_with_either_kind_of_positions(positions: str) -> None:
    """A decoder without positions gives the same last state for any order of the tokens before it."""
    decoder = make(positions)
    layout = Layout(causal=True, positions_BT=torch.arange(4)[None])
    with torch.no_grad():
        last = [decoder(decoder.embed(torch.tensor([ids])), layout)[0, -1] for ids in ([1, 2, 3, 9], [3, 1, 2, 9])]
    assert not torch.allclose(last[0], last[1], atol=1e-4)


def test_rotary_codes_follow_from_positions() -> None:
    assert DecoderConfig().transformer.rope_theta == 10_000.0
    assert DecoderConfig.parse({"transformer": SMALL}).transformer.rope_theta == 10_000.0
    learned = DecoderConfig.parse({"positions": "learned"})
    assert learned.transformer.rope_theta is None and learned.transformer.norm == "rms"
    assert DecoderConfig.parse(learned.to_data()) == learned
    with pytest.raises(
        ConfigError, match=r"positions: learned and transformer.rope_theta: 500.0 contradict each other"
    ):
        DecoderConfig.parse({"positions": "learned", "transformer": {**SMALL, "rope_theta": 500.0}})
    with pytest.raises(ConfigError, match=r"positions: rope and transformer.rope_theta: None contradict"):
        DecoderConfig.parse({"transformer": {**SMALL, "rope_theta": None}})


def test_what_a_decoder_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="follows from the streams that enter by cross_attention"):
        DecoderConfig.parse({"transformer": {**SMALL, "cross_width": 8}})
    with pytest.raises(ConfigError, match="unknown backbone 'decodr'; did you mean 'decoder'"):
        BACKBONES.parse("decodr")
