"""LoRA, DoRA, (IA)^3: start as nothing, train only themselves, keep the base's names, merge to the same outputs."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.models.adapters import (
    ADAPTERS,
    Adapted,
    adapter_names,
    adapter_parameters,
    apply_adapter,
    asleep_parameters,
    merge_adapters,
    use_adapters,
)
from polymodal.models.adapters.dora import DoRAConfig
from polymodal.models.adapters.ia3 import IA3Config
from polymodal.models.adapters.lora import LoRAConfig

sys.path.insert(0, str(Path(__file__).parent))
from toy_stack import IDS, Stack, stir, trained

LORA = LoRAConfig(rank=2, alpha=3.0)
EMBEDDED = LoRAConfig(rank=2, match=("*.q_proj",), embeddings=("embed",))
IA3 = IA3Config(match=("*.v_proj",), inputs=("*.q_proj",))
DORA = DoRAConfig(rank=2, alpha=3.0)
KINDS = {"lora": LORA, "rank_stabilised": LORA.model_copy(update={"rank_stabilised": True}), "embedded": EMBEDDED,
         "dora": DORA, "ia3": IA3}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_output_and_only_it_trains(kind):
    before = Stack()(IDS)
    model = Stack()
    names = apply_adapter(model, KINDS[kind])
    assert names
    for old, new in zip(before, model(IDS), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-6, atol=1e-6)
    own = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)
    asleep = asleep_parameters(model)
    logits, features = model(IDS)
    (logits.square().mean() + features.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in own), name
        if name in own:
            assert bool(parameter.grad.any()) == (name not in asleep), name


def test_names_and_storage_of_the_base_stay():
    plain, model = Stack(), Stack()
    weight = model.blocks[0].q_proj.weight
    apply_adapter(model, LoRAConfig(rank=2, match=["*.q_proj"]), "tone")
    added = {f"blocks.{i}.q_proj.adapters.tone.lora_{leaf}" for i in (0, 1) for leaf in "ab"}
    assert (
        set(model.state_dict())
        == set(plain.state_dict()) | added
        == set(plain.state_dict()) | set(adapter_parameters(model))
    )
    assert model.blocks[0].q_proj.weight is weight
    assert model.state_dict()["blocks.0.q_proj.adapters.tone.lora_a"].shape == (2, 6)
    assert isinstance(model.blocks[0].q_proj, Adapted) and isinstance(model.blocks[0].q_proj, nn.Linear)
    assert type(model.blocks[0].v_proj) is nn.Linear
    assert type(copy.deepcopy(model).blocks[0].q_proj) is type(model.blocks[0].q_proj)


def test_outputs_are_the_formulas_of_the_papers():
    x = torch.randn(5, 6)
    layer = trained(LORA).blocks[0].q_proj
    lora = layer.adapters["a"]
    expected = x @ (layer.weight + 1.5 * lora.lora_b @ lora.lora_a).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    stabilised = trained(KINDS["rank_stabilised"]).blocks[0].q_proj
    expected = x @ (layer.weight + 3.0 / 2**0.5 * lora.lora_b @ lora.lora_a).T + layer.bias
    torch.testing.assert_close(stabilised(x), expected, rtol=1e-5, atol=1e-5)
    layer = trained(DORA).blocks[0].q_proj
    dora = layer.adapters["a"]
    direction = layer.weight + 1.5 * dora.lora_b @ dora.lora_a
    expected = x @ (dora.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    model = trained(IA3)
    gains = [model.blocks[0].q_proj.adapters["a"].gain, model.blocks[0].v_proj.adapters["a"].gain]
    q, v = model.blocks[0].q_proj, model.blocks[0].v_proj
    torch.testing.assert_close(q(x), nn.functional.linear(x * gains[0], q.weight, q.bias))
    torch.testing.assert_close(v(x), nn.functional.linear(x, v.weight) * gains[1])
    embed = trained(EMBEDDED).embed
    own = embed.adapters["a"]
    torch.testing.assert_close(embed(IDS), embed.weight[IDS] + 8.0 * (own.lora_b @ own.lora_a).T[IDS])


@pytest.mark.parametrize(
    "kinds", [["lora"], ["dora"], ["ia3"], ["embedded"], ["lora", "rank_stabilised"], ["dora", "lora", "ia3"]]
)
def test_merged_equals_unmerged_and_undo_is_exact(kinds):
    model = trained(*(KINDS[kind] for kind in kinds)).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = model.embed.weight
    with torch.no_grad():
        before = model(IDS)
        merged = merge_adapters(model)
        assert merged.layers and not adapter_names(model)
        assert not any(isinstance(module, Adapted) for module in model.modules())
        if kinds != ["embedded"]:
            assert model.embed.weight is shared, "the embedding that was tied to the head is untouched"
        after = model(IDS)
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(old, new, rtol=1e-12, atol=1e-12)
        merged.undo()
        assert set(model.state_dict()) == set(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        for old, new in zip(before, model(IDS), strict=True):
            assert torch.equal(old, new)


def test_several_act_at_once_and_any_of_them_alone():
    model = trained(LORA, DORA)
    both = model(IDS)[1]
    use_adapters(model, ["a"])
    one = model(IDS)[1]
    use_adapters(model, [])
    none = model(IDS)[1]
    torch.testing.assert_close(none, Stack()(IDS)[1])
    assert not torch.allclose(both, one) and not torch.allclose(one, none)
    q, x = model.blocks[0].q_proj, torch.randn(4, 6)
    base = nn.functional.linear(x, q.weight, q.bias)
    alone = []
    for name in "ab":
        use_adapters(model, [name])
        alone.append(q(x) - base)
    use_adapters(model, ["b", "a"])
    torch.testing.assert_close(q(x), base + alone[0] + alone[1])
    with pytest.raises(ConfigError, match=r"unknown adapter 'c'. Valid: a, b"):
        use_adapters(model, ["c"])
    with pytest.raises(ConfigError, match="the model has no adapters, not 'c'"):
        use_adapters(Stack(), ["c"])


def test_one_of_several_merges_only_where_nothing_changes():
    model = trained(LORA, LORA)
    before = model(IDS)[1]
    merge_adapters(model, ["a"])
    assert adapter_names(model) == ["b"]
    torch.testing.assert_close(model(IDS)[1], before, rtol=1e-5, atol=1e-6)
    model = trained(DORA, LORA, IA3Config(match=("*.q_proj",), inputs=()))
    before = model(IDS)[1]
    with pytest.raises(ConfigError, match=r"merge: blocks.0.q_proj: merging b would change what 'a' does, which stays"):
        merge_adapters(model, ["b"])
    with pytest.raises(ConfigError, match=r"merging c would change what 'a' does"):
        merge_adapters(model, ["c"])
    merge_adapters(model, ["a", "b"])
    assert adapter_names(model) == ["c"]
    torch.testing.assert_close(model(IDS)[1], before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="unknown adapter 'x'"):
        merge_adapters(model, ["x"])


def test_a_layer_that_stands_in_two_places_is_adapted_in_both():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first

    model = Shared()
    apply_adapter(model, LoRAConfig(rank=1))
    assert isinstance(model.second, Adapted) and model.second is model.first


def test_the_part_itself_may_be_a_linear_layer():
    layer = nn.Linear(3, 2)
    assert apply_adapter(layer, LoRAConfig(rank=1)) == [""]
    names = {"weight", "bias", "adapters.default.lora_a", "adapters.default.lora_b"}
    assert set(layer.state_dict()) == names and set(adapter_parameters(layer)) == names - {"weight", "bias"}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_acts_on_the_update_alone_and_only_in_training(kind):
    model = trained(ADAPTERS.parse({"use": kind, "rank": 2, "dropout": 0.9}))
    layer, x = model.blocks[0].q_proj, torch.randn(50, 6)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))
    if kind == "lora":
        layer.adapters["a"].lora_b.data.zero_()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_applying_again_goes_on_with_the_adapter():
    model = trained(LoRAConfig(rank=2, match=["*.q_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert apply_adapter(model, LoRAConfig(rank=2, match=["blocks.0.q_proj"]), "a") == ["blocks.0.q_proj"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.blocks[0].q_proj.adapters["a"].lora_a.requires_grad
    assert not model.blocks[1].q_proj.adapters["a"].lora_a.requires_grad, "an adapter that is not named rests"


def test_the_draw_follows_the_seed_and_the_type_follows_the_base():
    layers = []
    for _ in range(2):
        layer = nn.Linear(4, 4).bfloat16()
        torch.manual_seed(3)
        apply_adapter(layer, DoRAConfig(rank=2))
        layers.append(layer.adapters["default"])
    assert torch.equal(layers[0].lora_a, layers[1].lora_a)
    assert {p.dtype for p in layers[0].parameters()} == {torch.bfloat16}


def test_messages():
    with pytest.raises(ConfigError) as error:
        apply_adapter(Stack(), LoRAConfig(match=["q_prj"]), where="train[1].adapter")
    message = str(error.value)
    assert message.startswith("train[1].adapter.match: no linear layer matches 'q_prj'; nearest: blocks.0.q_proj")
    assert "or a pattern with *" in message
    with pytest.raises(ConfigError, match="there is none to choose from"):
        apply_adapter(nn.LayerNorm(3), LoRAConfig())
    with pytest.raises(ConfigError, match=r"adapter.embeddings: no embedding matches 'embd'; nearest: embed"):
        apply_adapter(Stack(), LoRAConfig(embeddings=["embd"]))
    with pytest.raises(ConfigError, match=r"adapter.inputs: no linear layer matches '\*.down_proj'"):
        apply_adapter(Stack(), IA3Config(match=("*.q_proj",)))
    with pytest.raises(ConfigError, match=r"found the adapter name 'a.b', expected letters"):
        apply_adapter(Stack(), LORA, "a.b")
    model = Stack()
    apply_adapter(model, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=r"has an adapter 'default' of other settings .* rank 2, .* not .*rank 4"):
        apply_adapter(model, LoRAConfig(rank=4))
    with pytest.raises(
        ConfigError, match=r"other settings .*use lora.* not .*use dora.* give the new one another name"
    ):
        apply_adapter(model, DoRAConfig(rank=2))
    with pytest.raises(ConfigError, match="unknown adapter 'lorra'; did you mean 'lora'"):
        ADAPTERS.parse("lorra")
    with pytest.raises(ConfigError, match="rank: Input should be greater than or equal to 1; found 0"):
        ADAPTERS.parse({"use": "lora", "rank": 0})


def test_an_unmatched_pattern_leaves_the_module_as_it_was():
    model = Stack()
    with pytest.raises(ConfigError):
        apply_adapter(model, LoRAConfig(match=["*.q_proj", "nothing"]))
    assert set(model.state_dict()) == set(Stack().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


class TestAgainstThePeftLibrary:
    """The same numbers in our adapters and in the reference's give the same outputs and the same merged weights."""

    @pytest.mark.parametrize("kind", ["lora", "rank_stabilised", "dora", "ia3", "embedded"])
    def test_outputs_and_merged_weights(self, kind):
        peft = pytest.importorskip("peft")
        config = KINDS[kind]
        ours = trained(config)
        if kind == "ia3":
            reference = peft.IA3Config(target_modules=["v_proj", "q_proj"], feedforward_modules=["q_proj"])
        else:
            targets = ["q_proj", "embed"] if kind == "embedded" else ["q_proj", "v_proj", "head"]
            reference = peft.LoraConfig(
                r=2, lora_alpha=config.alpha, target_modules=targets, use_rslora=config.rank_stabilised,
                use_dora=kind == "dora",
            )  # fmt: skip
        theirs = peft.get_peft_model(Stack(), reference)
        names = {
            "lora_A": "lora_a", "lora_B": "lora_b", "lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b",
            "lora_magnitude_vector": "magnitude", "ia3_l": "gain",
        }  # fmt: skip
        own = adapter_parameters(ours)
        copied = 0
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
                path, _, leaf = name.rpartition(".")
                if leaf in names:
                    parameter.copy_(own[f"{path}.adapters.a.{names[leaf]}"].reshape(parameter.shape))
                    copied += 1
            assert copied == len(own)
            for mine, other in zip(ours(IDS), theirs.eval()(IDS), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            merge_adapters(ours)
            unloaded = theirs.merge_and_unload().state_dict()
            for name, tensor in ours.state_dict().items():
                if name == ("head.weight" if kind == "embedded" else "embed.weight"):
                    continue  # merging parts the tied weights here, there the other one follows
                torch.testing.assert_close(tensor, unloaded[name], rtol=1e-5, atol=1e-5)


def test_stirred_adapters_differ():
    assert not torch.equal(trained(LORA)(IDS)[0], stir(trained(LORA), 2)(IDS)[0])
