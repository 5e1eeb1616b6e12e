"""Prompt and prefix tuning: packed, padded and cached give the same; positions follow the virtual tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.models.adapters import ADAPTERS, adapter_parameters, apply_adapter, merge_adapters, use_adapters
from polymodal.models.backbones.decoder import Decoder, DecoderConfig
from polymodal.models.layers.layout import Layout

sys.path.insert(0, str(Path(__file__).parent))
from toy_stack import stir

PROMPT, PREFIX = {"use": "prompt", "tokens": 3}, {"use": "prefix", "tokens": 2, "std": 0.5}
SHAPE = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "norm": "rms"}


def decoder(positions="rope", *adapters, max_tokens=16) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig.parse({"transformer": SHAPE, "positions": positions, "max_tokens": max_tokens})
    model = config.build(11).eval()
    for index, adapter in enumerate(adapters):
        assert apply_adapter(model, ADAPTERS.parse(adapter), f"v{index}") == [""]
    return stir(model)


def padded(*lengths):
    longest = max(lengths)
    is_valid = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return Layout.padded(is_valid, causal=True, positions_BT=torch.arange(longest)[None].expand(len(lengths), -1))


def sequence(tokens, seed=0):
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_prompt_is_tokens_before_the_sequence(positions):
    model = decoder(positions, PROMPT)
    x = sequence(5)
    prompt = adapter_parameters(model)["adapters.v0.prompt"]
    got = model(x, padded(5))
    use_adapters(model, [])
    whole = model(torch.cat((prompt[None], x), 1), padded(8))
    torch.testing.assert_close(got, whole[:, 3:], rtol=1e-5, atol=1e-5)


PARALLEL = {"use": "bottleneck", "width": 4, "parallel": True}
INSIDE = [{"use": use, "match": match} for use in ("lora", "ia3") for match in (["*_proj"],)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "adapters", [[PROMPT], [PREFIX, PROMPT], ["bottleneck"], [PARALLEL], INSIDE, [*INSIDE, PREFIX]]
)
def test_reading_some_tokens_gives_their_states(adapters, packed):
    torch.manual_seed(0)
    model = DecoderConfig.parse({"transformer": SHAPE, "max_tokens": 16}).build(11)
    for index, adapter in enumerate(adapters):
        apply_adapter(model, ADAPTERS.parse(adapter), f"v{index}")
    stir(model)
    if packed:
        x, layout = sequence(10), Layout.packed([6, 4], True, torch.tensor([[*range(6), *range(4)]]))
    else:
        x, layout = sequence(12).view(2, 6, 16), padded(6, 4)
    read = torch.tensor([1, 5, 7, 8])
    torch.testing.assert_close(model.read(x, layout, read), model(x, layout).flatten(0, 1)[read], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("adapters", [[PROMPT], [PREFIX], [PREFIX, PROMPT]])
def test_packed_padded_and_cached_are_the_same(positions, adapters):
    model = decoder(positions, *adapters)
    long, short = sequence(6), sequence(4, 1)
    alone = [model(long, padded(6)), model(short, padded(4))]
    filled = torch.cat((short, torch.zeros(1, 2, 16)), 1)
    both = model(torch.cat((long, filled)), padded(6, 4))
    torch.testing.assert_close(both[:1], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1:, :4], alone[1], rtol=1e-5, atol=1e-5)
    counted = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    packed = model(torch.cat((long, short), 1), Layout.packed([6, 4], True, counted))
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        cache = model.new_cache(2, 8)
        first = model(torch.cat((long[:, :4], filled[:, :4])), padded(4, 2), cache)
        torch.testing.assert_close(first[:1], alone[0][:, :4], rtol=1e-5, atol=1e-5)
        assert cache.lengths_B.tolist() == [4, 2] and cache.num_virtual > 0
        held = cache.clone()
        for step in range(2):
            x = torch.cat((long[:, 4 + step :][:, :1], short[:, 2 + step :][:, :1]))
            states = model(x, Layout(causal=True, positions_BT=held.lengths_B[:, None]), held)
            expected = torch.cat((alone[0][:, 4 + step :][:, :1], alone[1][:, 2 + step :][:, :1]))
            torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        cache.crop(1)
        cache.select(torch.tensor([1]))
        positions_BT = 1 + torch.arange(3)[None]
        again = model(short[:, 1:], Layout(causal=True, positions_BT=positions_BT), cache)
        torch.testing.assert_close(again, alone[1][:, 1:], rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match=r"found 4 tokens, expected none before virtual tokens"):
            cache.reserve([])


def test_a_prefix_is_keys_and_values_that_every_token_sees():
    model = decoder("rope", PREFIX)
    apply_adapter(model, ADAPTERS.parse(PREFIX), "more")
    x = sequence(4)
    both = model(x, padded(4))
    own = adapter_parameters(model)
    joined = decoder("rope")
    apply_adapter(joined, ADAPTERS.parse({**PREFIX, "tokens": 4}))
    for kind in ("keys", "values"):
        parts = [own[f"adapters.v0.{kind}"], own[f"adapters.more.{kind}"]]
        adapter_parameters(joined)[f"adapters.default.{kind}"].data = torch.cat(parts, 2).detach()
    torch.testing.assert_close(joined(x, padded(4)), both)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_gets_a_gradient(checkpointing):
    model = decoder("rope", PREFIX, PROMPT)
    model.transformer.checkpointing = checkpointing
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapter_parameters(model))
    x = torch.cat((sequence(3), sequence(2, 1)), 1)
    model(x, Layout.packed([3, 2], True, torch.tensor([[0, 1, 2, 0, 1]]))).square().sum().backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


def test_initial_values():
    model = decoder("rope")
    apply_adapter(model, ADAPTERS.parse({"use": "prompt", "tokens": 4}))
    prompt = adapter_parameters(model)["adapters.default.prompt"]
    assert all(any(torch.equal(row, old) for old in model.embed_tokens.weight) for row in prompt)
    other = decoder("rope")
    apply_adapter(other, ADAPTERS.parse({"use": "prompt", "tokens": 400, "init": "gaussian"}))
    drawn = adapter_parameters(other)["adapters.default.prompt"]
    torch.testing.assert_close(drawn.std(), other.embed_tokens.weight.std(), rtol=0.1, atol=0.0)


def test_messages():
    with pytest.raises(ConfigError, match="found 3 virtual tokens and 14 real ones, expected at most 16 together"):
        decoder("learned", PROMPT)(sequence(14), padded(14))
    with pytest.raises(ConfigError, match=r"adapter.match: no decoder matches '\*'; there is none to choose from"):
        apply_adapter(torch.nn.Linear(3, 3), ADAPTERS.parse("prompt"))
    with pytest.raises(ConfigError, match="the adapter 'v0' is a 'prefix', which no weight can stand in for"):
        merge_adapters(decoder("rope", PREFIX))
