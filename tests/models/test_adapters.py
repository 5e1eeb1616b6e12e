"""LoRA: starts as nothing, trains only itself, keeps the base's names, merges to the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.models.adapters import ADAPTERS, LoRAConfig, LoRALinear, apply_lora, is_adapter, merge_lora


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.v_proj(self.norm(x) + self.q_proj(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x), torch.stack([block(x) for block in self.blocks])


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def trained(config: LoRAConfig) -> Stack:
    """A stack whose adapters are no longer zero."""
    model = Stack()
    apply_lora(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def test_a_fresh_adapter_changes_no_output():
    before = Stack()(IDS)
    model = Stack()
    names = apply_lora(model, LoRAConfig(rank=2))
    assert names == ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj", "head"]
    for old, new in zip(before, model(IDS), strict=True):
        assert torch.equal(old, new)


def test_names_shapes_and_storage_of_the_base_stay():
    plain, model = Stack(), Stack()
    weight = model.blocks[0].q_proj.weight
    apply_lora(model, LoRAConfig(rank=2, match=["*.q_proj"]))
    added = {f"blocks.{i}.q_proj.lora_{leaf}" for i in (0, 1) for leaf in "ab"}
    assert set(model.state_dict()) == set(plain.state_dict()) | added
    assert model.blocks[0].q_proj.weight is weight
    assert model.state_dict()["blocks.0.q_proj.lora_a"].shape == (2, 6)
    assert model.state_dict()["blocks.0.q_proj.lora_b"].shape == (6, 2)
    assert isinstance(model.blocks[0].q_proj, LoRALinear) and type(model.blocks[0].v_proj) is nn.Linear


def test_only_the_adapter_trains():
    model = Stack()
    apply_lora(model, LoRAConfig(rank=2))
    assert all(parameter.requires_grad == is_adapter(name) for name, parameter in model.named_parameters())
    logits, features = model(IDS)
    (logits.square().mean() + features.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
    assert model.blocks[0].q_proj.lora_b.grad.abs().sum() > 0


def test_output_is_the_formula_of_the_paper():
    model = trained(LoRAConfig(rank=2, alpha=6.0))
    layer, x = model.blocks[0].q_proj, torch.randn(5, 6)
    expected = x @ (layer.weight + 3.0 * layer.lora_b @ layer.lora_a).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_merged_equals_unmerged():
    model = trained(LoRAConfig(rank=2, alpha=0.5))
    shared = model.embed.weight.clone()
    with torch.no_grad():
        before = model.double()(IDS)
    assert len(merge_lora(model)) == 5
    assert not any(is_adapter(name) for name in model.state_dict())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert torch.equal(model.embed.weight, shared.double()), "the embedding that was tied to the head is untouched"
    with torch.no_grad():
        after = model(IDS)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, rtol=1e-6, atol=1e-6)
    assert set(model.state_dict()) == set(Stack().state_dict())
    assert merge_lora(model) == []


def test_a_layer_that_stands_in_two_places_is_adapted_in_both():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first

    model = Shared()
    apply_lora(model, LoRAConfig(rank=1))
    assert isinstance(model.second, LoRALinear) and model.second is model.first


def test_the_part_itself_may_be_a_linear_layer():
    layer = nn.Linear(3, 2)
    assert apply_lora(layer, LoRAConfig(rank=1)) == [""]
    assert set(layer.state_dict()) == {"weight", "bias", "lora_a", "lora_b"}


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    model = trained(LoRAConfig(rank=2, dropout=0.9))
    layer, x = model.blocks[0].q_proj, torch.randn(50, 6)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_b.data.zero_()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_applying_again_goes_on_with_the_adapter():
    model = trained(LoRAConfig(rank=2, match=["*.q_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert apply_lora(model, LoRAConfig(rank=2, match=["blocks.0.q_proj"])) == ["blocks.0.q_proj"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.blocks[0].q_proj.lora_a.requires_grad
    assert not model.blocks[1].q_proj.lora_a.requires_grad, "an adapter that is not named rests"


def test_the_draw_follows_the_seed_and_the_type_follows_the_base():
    layers = []
    for _ in range(2):
        layer = nn.Linear(4, 4).bfloat16()
        torch.manual_seed(3)
        apply_lora(layer, LoRAConfig(rank=2))
        layers.append(layer)
    assert torch.equal(layers[0].lora_a, layers[1].lora_a)
    assert layers[0].lora_a.dtype == torch.bfloat16


def test_messages():
    with pytest.raises(ConfigError) as error:
        apply_lora(Stack(), LoRAConfig(match=["q_prj"]), "train[1].adapter")
    message = str(error.value)
    assert message.startswith("train[1].adapter.match: no linear layer matches 'q_prj'; nearest: blocks.0.q_proj")
    assert "or a pattern with *" in message
    with pytest.raises(ConfigError, match="there is none to choose from"):
        apply_lora(nn.LayerNorm(3), LoRAConfig())
    model = Stack()
    apply_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=r"has a LoRA adapter of rank 2, alpha 16.0, .* not rank 4, .* merge it"):
        apply_lora(model, LoRAConfig(rank=4))
    with pytest.raises(ConfigError, match="unknown adapter 'lorra'; did you mean 'lora'"):
        ADAPTERS.parse("lorra")
    with pytest.raises(ConfigError, match="rank: Input should be greater than or equal to 1; found 0"):
        ADAPTERS.parse({"use": "lora", "rank": 0})


def test_an_unmatched_pattern_leaves_the_module_as_it_was():
    model = Stack()
    with pytest.raises(ConfigError):
        apply_lora(model, LoRAConfig(match=["*.q_proj", "nothing"]))
    assert set(model.state_dict()) == set(Stack().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
