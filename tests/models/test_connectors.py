"""What single connectors compute: worked examples, parity with BLIP-2, and their messages."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.connectors import CONNECTORS


def passing(use: str, width: int, **settings: Any) -> nn.Module:
    """A connector whose last map is the identity, so that its joining can be read."""
    connector = CONNECTORS.parse({"use": use, **settings}).build(width, width)
    linear = connector.stack.layers[0]
    linear.weight.data.copy_(torch.eye(*linear.weight.shape))
    linear.bias.data.zero_()
    return connector


def whole(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def test_pooling_a_sequence_worked_example() -> None:
    x = torch.tensor([[[1.0], [3.0], [5.0], [9.0]]])
    is_valid = torch.tensor([[True, True, True, False]])
    tokens, valid = passing("pool", 1, factor=2)(x, is_valid)
    assert tokens[0, :, 0].tolist() == [2.0, 5.0] and valid.all()


def test_pooling_a_grid_worked_example() -> None:
    x = torch.arange(9.0).view(1, 9, 1)  # rows 0 1 2 / 3 4 5 / 6 7 8
    tokens, _ = passing("pool", 1, factor=2, over="grid")(x, whole(x))
    assert tokens[0, :, 0].tolist() == [2.0, 3.5, 6.5, 8.0]


def test_several_grids_in_one_unit_stay_apart() -> None:
    x = torch.tensor([0.0, 0, 0, 0, 8, 8, 8, 8]).view(1, 8, 1)
    tokens, _ = passing("pool", 1, over="grid", grid_features=4)(x, whole(x))
    assert tokens[0, :, 0].tolist() == [0.0, 8.0]


def test_pixel_shuffle_gathers_squares() -> None:
    connector = CONNECTORS.parse({"use": "pixel_shuffle"}).build(1, 4)
    linear = connector.stack.layers[0]
    linear.weight.data.copy_(torch.eye(4))
    x = torch.arange(16.0).view(1, 16, 1)
    tokens, _ = connector(x, whole(x))
    assert tokens[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_mlp_is_linear_maps_with_gelu_between() -> None:
    torch.manual_seed(0)
    connector = CONNECTORS.parse("mlp").build(4, 6)
    first, second = connector.stack.layers
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(connector(x, whole(x))[0], second(nn.functional.gelu(first(x))))


def copy(target: nn.Module, source: nn.Module) -> None:
    target.weight.data.copy_(source.weight)
    target.bias.data.copy_(source.bias)


def test_qformer_equals_blip2() -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    settings = Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=12,
        cross_attention_frequency=2, attn_implementation="eager",
    )  # fmt: skip
    reference = Blip2QFormerModel(settings).eval()
    torch.manual_seed(0)
    for parameter in reference.parameters():
        parameter.data.normal_(std=0.2)
    config = CONNECTORS.parse({"use": "qformer", "queries": 5, "width": 32, "depth": 3, "heads": 4, "mlp_dim": 64})
    ours = config.build(12, 16).eval()
    copy(ours.query_norm, reference.layernorm)
    for block, layer in zip(ours.transformer.blocks, reference.encoder.layer, strict=True):
        pairs = [(block.attention, block.attention_norm, layer.attention)]
        if layer.has_cross_attention:
            pairs.append((block.cross_attention, block.cross_norm, layer.crossattention))
        for attention, norm, theirs in pairs:
            for name, other in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                copy(getattr(attention, name), getattr(theirs.attention, other))
            copy(attention.out_proj, theirs.output.dense)
            copy(norm, theirs.output.LayerNorm)
        copy(block.mlp.up_proj, layer.intermediate_query.dense)
        copy(block.mlp.down_proj, layer.output_query.dense)
        copy(block.mlp_norm, layer.output_query.LayerNorm)
    x_UND = torch.randn(2, 7, 12)
    is_valid = torch.arange(7) < torch.tensor([[7], [4]])
    expected = reference(
        query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=x_UND, encoder_attention_mask=is_valid.long()
    ).last_hidden_state
    torch.testing.assert_close(ours.states(x_UND, is_valid), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use", ["qformer", "perceiver"])
def test_resamplers_read_every_feature(use: str) -> None:
    torch.manual_seed(0)
    connector = CONNECTORS.parse(use).build(8, 8).eval()
    x = torch.randn(1, 6, 8, requires_grad=True)
    connector(x, whole(x))[0][0, 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_temporal_connectors_know_the_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    for case in ({"use": "temporal_attention"}, {"use": "temporal_lstm"}):
        connector = CONNECTORS.parse({**case, "output": "summary"}).build(8, 8).eval()
        nn.init.normal_(connector.out.layers[0].weight)
        one, other = connector(x, whole(x))[0], connector(x.flip(1), whole(x))[0]
        assert one.shape == (1, 1, 8)
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("case", [{"use": "temporal_attention", "causal": True}, {"use": "temporal_lstm"}])
def test_what_comes_later_does_not_reach_earlier_tokens(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    connector = CONNECTORS.parse(case).build(8, 8).eval()
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1.0
    one, other = connector(x, whole(x))[0], connector(changed, whole(x))[0]
    torch.testing.assert_close(one[:, :4], other[:, :4], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[:, 4:], other[:, 4:])


def test_qformer_dropout_acts_only_while_training() -> None:
    torch.manual_seed(0)
    connector = CONNECTORS.parse({"use": "qformer", "dropout": 0.5}).build(8, 8)
    x = torch.randn(1, 6, 8)
    assert not torch.equal(connector(x, whole(x))[0], connector(x, whole(x))[0])
    connector.eval()
    assert torch.equal(connector(x, whole(x))[0], connector(x, whole(x))[0])


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({"use": "pool", "over": "grid"}, 10, "found 10 features, expected a square grid such as 9"),
        ({"use": "pool", "over": "grid", "grid_features": 4}, 10, "expected a multiple of grid_features 4"),
        ({"use": "pixel_shuffle"}, 9, "found a grid of 3 x 3, expected a side that is a multiple of factor 2"),
        ({"use": "pixel_shuffle", "grid_features": 5}, 10, "set grid_features to the features of one"),
    ],
)
def test_counts_that_do_not_fit_are_named(settings: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CONNECTORS.parse(settings).num_tokens(count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use": "qformer", "width": 30}, "width 30 is not a multiple of heads 4"),
        ({"use": "perceiver", "width": 30}, "width 30 is not a multiple of heads 4"),
        ({"use": "temporal_attention", "width": 30}, "width 30 is not a multiple of heads 4"),
        ({"use": "temporal_lstm", "width": 31}, "multiple of 2"),
        ({"use": "mpl"}, "did you mean 'mlp'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CONNECTORS.parse(settings)
