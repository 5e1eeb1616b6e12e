"""Heads: what each gives, in closed form, and what each needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.models.heads.table import HEADS, HeadInputs, ProjectionConfig


def inputs(*, state_width: int | None = 6, embedding: bool = True) -> HeadInputs:
    torch.manual_seed(0)
    return HeadInputs(state_width, 11, {"image": 5, "text": 7}, nn.Embedding(11, 6) if embedding else None)


def test_a_tied_head_scores_states_against_the_embedding() -> None:
    given = inputs()
    head = HEADS.parse({"use": "next_token", "tied": True}).build(given)
    states = torch.randn(3, 6)
    assert given.embedding is not None
    torch.testing.assert_close(head(states), states @ given.embedding.weight.T)
    assert next(iter(head.parameters())) is given.embedding.weight


def test_an_untied_head_has_its_own_matrix() -> None:
    given = inputs()
    head = HEADS.parse({"use": "next_token", "tied": False}).build(given)
    assert head(torch.randn(2, 4, 6)).shape == (2, 4, 11)
    assert given.embedding is not None
    assert head.proj.weight is not given.embedding.weight


def test_projections_are_unit_vectors_in_float32_whatever_comes_in() -> None:
    head = ProjectionConfig(dim=4).build(inputs())
    found = head.to(torch.bfloat16)(torch.randn(9, 5, dtype=torch.bfloat16), "image")
    assert found.dtype == torch.float32 and found.shape == (9, 4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(9), rtol=1e-6, atol=1e-6)


def test_scale_starts_at_one_over_the_temperature_and_is_capped() -> None:
    head = ProjectionConfig(temperature=0.07).build(inputs())
    assert float(head.scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    assert float(head.log_scale.detach()) == pytest.approx(math.log(1 / 0.07), rel=1e-5)
    head.log_scale.data.fill_(9.0)
    assert float(head.scale.detach()) == 100.0


def test_a_projection_takes_the_streams_it_names() -> None:
    assert set(ProjectionConfig().build(inputs()).projs) == {"image", "text"}
    assert set(ProjectionConfig(streams=("text",)).build(inputs()).projs) == {"text"}
    with pytest.raises(
        ConfigError, match=r"streams \['sound'\] are not in the model; its streams: \['image', 'text'\]"
    ):
        ProjectionConfig(streams=("text", "sound")).build(inputs())


def test_a_class_head_needs_distinct_names() -> None:
    assert HEADS.parse({"use": "class", "classes": ["a", "b"]}).build(inputs())(torch.randn(3, 6)).shape == (3, 2)
    for classes in (["a"], ["a", "a"]):
        with pytest.raises(ConfigError, match="at least two distinct class names"):
            HEADS.parse({"use": "class", "classes": classes})


@pytest.mark.parametrize("use", ["class", "matching"])
def test_heads_on_states_need_a_backbone(use: str) -> None:
    data = {"use": use, **({"classes": ["a", "b"]} if use == "class" else {})}
    with pytest.raises(ConfigError, match=f"head {use}: needs the states of a backbone"):
        HEADS.parse(data).build(inputs(state_width=None))


def test_next_token_needs_a_decoder() -> None:
    with pytest.raises(ConfigError, match="head next_token: needs a decoder backbone"):
        HEADS.parse("next_token").build(inputs(embedding=False))


def test_a_projection_without_a_map_temperature_bound_or_bias() -> None:
    config = ProjectionConfig(dim=5, identity=("image",), temperature=None, max_scale=None, bias=None)
    head = config.build(inputs())
    assert set(head.state_dict()) == {"projs.text.weight"}
    x = torch.randn(3, 5)
    torch.testing.assert_close(head(x, "image"), x / x.norm(dim=1, keepdim=True))
    assert (float(head.scale), float(head.bias)) == (1.0, 0.0)
    open_ended = ProjectionConfig(max_scale=None).build(inputs())
    open_ended.log_scale.data.fill_(9.0)
    assert float(open_ended.scale.detach()) > 8000
    with pytest.raises(ConfigError, match="pooled vectors have width 7, the space 5"):
        ProjectionConfig(dim=5, identity=("text",)).build(inputs())
    with pytest.raises(ConfigError, match=r"identity: \['text'\] are not among the streams \['image'\]"):
        ProjectionConfig.parse({"streams": ["image"], "identity": ["text"]})


def test_a_class_head_on_a_stream_reads_what_it_is_told() -> None:
    features = torch.arange(20.0).view(1, 4, 5)
    is_valid, pooled = torch.tensor([[True, True, False, False]]), torch.full((1, 5), -1.0)
    mean = features[:, :2].mean(dim=1)
    expected = {"pooled": pooled, "mean": mean, "pooled_mean": torch.cat((pooled, mean), dim=1)}
    for take, state in expected.items():
        config = HEADS.parse({"use": "class", "classes": ["a", "b"], "stream": "image", "take": take})
        torch.testing.assert_close(config.read(features, is_valid, pooled), state)
        assert config.build(inputs(state_width=None)).in_features == state.shape[1]
    with pytest.raises(ConfigError, match="name the 'stream', or leave 'take' out"):
        HEADS.parse({"use": "class", "classes": ["a", "b"], "take": "mean"})
    with pytest.raises(ConfigError, match="head class: unknown stream 'imago'; did you mean 'image'"):
        HEADS.parse({"use": "class", "classes": ["a", "b"], "stream": "imago"}).build(inputs(state_width=None))
