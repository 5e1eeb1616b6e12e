"""Bottleneck adapters behind and beside the sublayers of a stack."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from polymodal.core.errors import ConfigError
from polymodal.models.adapters import adapter_parameters, apply_adapter, asleep_parameters, merge_adapters
from polymodal.models.adapters.bottleneck import BottleneckConfig
from polymodal.models.layers.attention import Attention
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.layers.mlp import MLP
from polymodal.models.layers.transformer import Transformer, TransformerConfig

sys.path.insert(0, str(Path(__file__).parent))
from toy_stack import stir


def stack(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(width=8, depth=2, heads=2, **changes)).eval()


X, LAYOUT = torch.randn(2, 3, 8), Layout(causal=True)


def test_houlsby_and_pfeiffer_are_patterns():
    plain = stack()(X, LAYOUT)
    model = stack()
    names = apply_adapter(model, BottleneckConfig(width=4))
    assert names == [f"blocks.{i}.{sublayer}" for i in (0, 1) for sublayer in ("attention", "mlp")]
    assert torch.equal(model(X, LAYOUT), plain)
    assert apply_adapter(stack(), BottleneckConfig(width=4, match=("*.mlp",))) == ["blocks.0.mlp", "blocks.1.mlp"]
    model(X, LAYOUT).square().sum().backward()
    asleep = asleep_parameters(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in adapter_parameters(model)), name
        if parameter.grad is not None:
            assert bool(parameter.grad.any()) == (name not in asleep), name


@pytest.mark.parametrize("parallel", [False, True])
def test_output_is_the_formula(parallel):
    torch.manual_seed(0)
    mlp = MLP(8, 16, "gelu", False, True)
    apply_adapter(mlp, BottleneckConfig(match=("*",), width=4, activation="silu", parallel=parallel, scale=2.0))
    stir(mlp)
    own = {name.rpartition(".")[2]: p for name, p in adapter_parameters(mlp).items()}
    base = MLP.forward(mlp, X)
    read = X if parallel else base
    expected = base + 2.0 * F.linear(F.silu(F.linear(read, own["down"], own["down_bias"])), own["up"], own["up_bias"])
    torch.testing.assert_close(mlp(X), expected)


def test_a_layer_that_ends_a_sublayer_is_the_same_place():
    behind, within = stack(), stack()
    torch.manual_seed(1)
    apply_adapter(behind, BottleneckConfig(width=4, match=("*.attention",)))
    torch.manual_seed(1)
    apply_adapter(within, BottleneckConfig(width=4, match=("*.out_proj",)))
    stir(behind), stir(within)
    torch.testing.assert_close(behind(X, LAYOUT), within(X, LAYOUT))
    packed = Layout.packed([2, 1], True)
    torch.testing.assert_close(behind(X[:1], packed), within(X[:1], packed))


def test_cross_attention_takes_one_too():
    model = stack(cross_width=5)
    memory = Memory(torch.randn(2, 4, 5))
    plain = model(X, LAYOUT, memory=memory)
    names = apply_adapter(model, BottleneckConfig(width=4, match=("*.cross_attention",)))
    assert names == ["blocks.0.cross_attention", "blocks.1.cross_attention"]
    assert isinstance(model.blocks[0].cross_attention, Attention)
    stir(model)
    assert not torch.allclose(model(X, LAYOUT, memory=memory), plain)
    torch.testing.assert_close(model(X, LAYOUT), stack(cross_width=5)(X, LAYOUT))


def test_messages():
    model = stack()
    with pytest.raises(ConfigError, match=r"adapter.match: no sublayer or linear layer matches '\*.atention'"):
        apply_adapter(model, BottleneckConfig(match=("*.atention",)))
    apply_adapter(model, BottleneckConfig(width=4))
    with pytest.raises(ConfigError, match="attention: the adapter 'default' is a 'bottleneck', which no"):
        merge_adapters(model)
