"""The next-token head's options, rows that stand apart, and ids that are never generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import asked, build, decoder_data, stream

from polymodal.core.errors import ConfigError
from polymodal.core.samples import Sample, conversation
from polymodal.inference.engine import Engine
from polymodal.inference.sampling import Sampling
from polymodal.models.connectors.perceiver import PerceiverConfig
from polymodal.models.heads.next_token import NextTokenConfig
from polymodal.models.layers.mlp import activate


def text_only(head: dict[str, Any] | None = None, **backbone: Any) -> dict[str, Any]:
    return {**decoder_data(**backbone), "heads": {"answer": {"use": "next_token", **(head or {})}}}


def test_transform_bias_and_scale_do_what_they_say() -> None:
    toy = build(text_only({"transform": True, "activation": "relu", "norm_eps": 1e-5, "bias": True, "scale": 0.5}))
    head: Any = toy.network.head("next_token")
    head.proj.bias.data.normal_()
    states = torch.randn(3, 24)
    inner = head.norm(activate(head.dense(states), "relu")) * 0.5
    expected = inner @ toy.network.decoder.embed_tokens.weight.T + head.proj.bias
    torch.testing.assert_close(head(states), expected)
    with pytest.raises(ConfigError, match="'activation' belongs to transform: true"):
        NextTokenConfig.parse({"activation": "relu"})


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_stand_apart_are_ordinary_ids(tied: bool) -> None:
    plain, apart = build(text_only({"tied": tied})), build(text_only({"tied": tied}, added_rows=5))
    size = plain.tokenizer.size
    state = plain.network.state_dict()
    for name in ("backbone.embed_tokens", "heads.answer.proj"):
        other = "backbone.embed_added" if "embed" in name else "heads.answer.added"
        rows = state.pop(name + ".weight")
        state[name + ".weight"], state[other + ".weight"] = rows[: size - 5], rows[size - 5 :]
    apart.network.load_state_dict(state)
    for packed in (False, True):
        batches = [toy.batch([asked(0, "image"), asked(1)], packed=packed) for toy in (plain, apart)]
        ids = torch.arange(size - 10, size)
        for batch in batches:
            batch.ids[0, -10:] = ids
        one, other = (toy.network(batch).token_logits for toy, batch in zip((plain, apart), batches, strict=True))
        assert other.shape[1] == size
        torch.testing.assert_close(one, other)
    apart.network.decoder.embed_tokens.weight.requires_grad_(False)
    apart.network(batches[1]).token_logits.sum().backward()
    assert apart.network.decoder.embed_tokens.weight.grad is None
    assert bool(apart.network.decoder.embed_added.weight.grad.any())


def test_suppressed_ids_are_never_generated() -> None:
    toy = build(text_only({"tied": False}), seed=1)
    engine, question = Engine(toy.network, toy.processor), conversation("What is it?")
    first = engine.generate([question], Sampling(max_new_tokens=8))[0].ids
    later = next(id for id in first if id != first[0])
    toy = build(text_only({"tied": False, "suppress": [later], "suppress_first": [first[0]]}), seed=1)
    engine = Engine(toy.network, toy.processor)
    found = engine.generate([question], Sampling(max_new_tokens=8))[0].ids
    assert later not in found and found[0] != first[0]
    assert list(engine.stream(question, Sampling(max_new_tokens=8))) == found
    drawn = [
        engine.generate([question], Sampling(max_new_tokens=8, temperature=5.0, seed=seed))[0].ids for seed in range(8)
    ]
    assert all(later not in ids and ids[0] != first[0] for ids in drawn)


def test_items_stand_between_tokens_of_their_own_once_between_neighbours() -> None:
    enters = {"use": "cross_attention", "mask": "latest_media", "around": "<|user|>"}
    data = text_only()
    data["streams"] = {"image": stream("image", enters=enters, connector="linear")}
    toy = build(data)
    fence, image = toy.tokenizer.control("<|user|>"), toy.tokenizer.media_id
    photos = asked(0, "image", "image").messages[0].parts[:2]
    plan = toy.processor.plan(conversation(*photos, "x", photos[0], answer="y"))
    words = toy.tokenizer.encode("x")
    assert plan.ids[1 : 9 + len(words)] == [fence, image, fence, image, fence, *words, fence, image, fence]
    assert [plan.ids[span.start] for span in plan.spans] == [image] * 3
    data["streams"]["image"]["enters"] = {"use": "cross_attention", "around": "<|user|>"}
    with pytest.raises(ConfigError, match="'around' belongs to a placeholder"):
        build(data)


def test_a_resampler_without_maps_keeps_the_features_width() -> None:
    config = PerceiverConfig.parse({"width": 16, "heads": 2, "head_dim": 5, "qk_norm": True, "project": False})
    connector = config.build(16, 16)
    assert sorted(name.split(".")[0] for name, _ in connector.named_children()) == ["blocks", "final_norm"]
    tokens, is_valid = connector(torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool))
    assert tokens.shape == (2, 32, 16) and bool(is_valid.all())
    with pytest.raises(ConfigError, match="expected equal widths with project: false"):
        config.build(16, 24)
    data = text_only()
    data["streams"] = {"image": stream("image", enters="cross_attention", connector=config.to_data())}
    toy = build(data)
    cross = toy.network.decoder.transformer.blocks[0].cross_attention
    assert cross.k_proj.in_features == 16 and cross.q_proj.in_features == 24
    sample = Sample("s", asked(0, "image").messages)
    assert toy.network(toy.batch([sample])).token_logits.isfinite().all()
