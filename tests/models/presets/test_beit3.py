"""BEiT-3: the published code's shapes and numbers, and the paper's routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import build, medium

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.compose import ModelConfig, MultimodalModel
from polymodal.models.presets import find_size
from polymodal.models.presets.architecture import Vocabulary
from polymodal.models.presets.beit3 import BEIT3
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters, wanted_names

SMALL = {
    "model_type": "beit3", "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "vocab_size": 300, "max_source_positions": 20,
}  # fmt: skip


def small(**changes: Any) -> dict[str, Any]:
    return BEIT3.to_model(HubConfigs({**SMALL, **changes}))


SAMPLES = [
    pm.Sample("a", views={"image": medium("image", 0), "text": pm.Text("a red cube")}),
    pm.Sample("b", views={"text": pm.Text("blue")}),
    pm.Sample("c", views={"image": medium("image", 1)}),
]


def test_every_tensor_has_the_published_name() -> None:
    network = MultimodalModel(ModelConfig.parse(small(task="retrieval")), 300)
    stored = BEIT3.names(network.config, ()).save({n: network.state_dict()[n] for n in wanted_names(network)}, "beit3")
    layer = "beit3.encoder.layers.2."
    shapes = {
        "beit3.text_embed.weight": (300, 16),
        "beit3.vision_embed.proj.weight": (16, 3, 4, 4),
        "beit3.vision_embed.mask_token": (1, 1, 16),
        "beit3.encoder.embed_positions.A.weight": (16 + 1 + 2, 16),
        "beit3.encoder.embed_positions.B.weight": (20, 16),
        layer + "self_attn.k_proj.A.weight": (16, 16),
        layer + "self_attn.inner_attn_ln.B.bias": (16,),
        layer + "self_attn_layer_norm.A.weight": (16,),
        layer + "ffn.B.fc1.weight": (64, 16),
        layer + "ffn.A.ffn_layernorm.weight": (64,),
        layer + "final_layer_norm.B.weight": (16,),
        "beit3.encoder.layer_norm.A.weight": (16,),
        "vision_head.weight": (16, 16),
        "logit_scale": (),
    }
    assert {name: tuple(stored[name].shape) for name in shapes} == shapes
    assert not [name for name in stored if "multiway" in name], "nothing is left without a published name"
    again = BEIT3.names(network.config, list(stored)).load(wanted_names(network), stored, "beit3")
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in again.items())


def test_one_block_follows_the_published_code() -> None:
    """Sub-norms: before the attention's output projection and within the MLP (Magneto, figure 2)."""
    toy = build(small())
    block = toy.network.backbone.transformer.blocks[0]  # type: ignore[union-attr]
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        from polymodal.models.layers.multiway import Routing

        found = block(x, None, Routing(torch.ones(1, 5, dtype=torch.int64), 2))
        own = {name: part.experts["language"] for name, part in block.named_children()}
        inner = own["attention_norm"](x)
        heads = [own[f"{p}_proj"](inner).view(5, 2, 8).transpose(0, 1) for p in "qkv"]
        mixed = (heads[0] @ heads[1].transpose(1, 2) / 8**0.5).softmax(-1) @ heads[2]
        y = x + own["out_proj"](own["sub_norm"](mixed.transpose(0, 1).reshape(1, 5, 16)))
        mlp = own["mlp"]
        expected = y + mlp.down_proj(mlp.sub_norm(F.gelu(mlp.up_proj(own["mlp_norm"](y)))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_text_goes_through_the_language_experts_alone() -> None:
    toy = build(small())
    before = toy.network(toy.batch(SAMPLES), ("merge",)).merged
    with torch.no_grad():
        for name, parameter in toy.network.named_parameters():
            if ".experts.vision." in name:
                parameter.add_(0.1)
    after = toy.network(toy.batch(SAMPLES), ("merge",)).merged
    assert (after != before).any(1).tolist() == [True, False, True]


def test_the_papers_joint_experts_take_pairs_alone() -> None:
    toy = build(small(routed_attention=False, joint_layers=1))
    assert "joint" not in toy.network.backbone.transformer.blocks[1].mlp.experts  # type: ignore[union-attr]
    before = toy.network(toy.batch(SAMPLES), ("merge",)).merged
    with torch.no_grad():
        toy.network.backbone.transformer.blocks[2].mlp.experts["joint"].down_proj.weight.add_(0.1)  # type: ignore[union-attr]
    after = toy.network(toy.batch(SAMPLES), ("merge",)).merged
    assert (after != before).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("options", [{}, {"task": "retrieval"}, {"task": "pretraining", "joint_layers": 1}])
def test_configs_read_back_as_they_were_written(options: dict[str, Any]) -> None:
    model = ModelConfig.parse(small(**options))
    files = BEIT3.to_hub(model, Vocabulary(300))
    assert BEIT3.model(HubConfigs(files["config.json"])) == model


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="beit3: found task 'vqa', expected encoder, retrieval or pretraining"):
        small(task="vqa")


@pytest.mark.parametrize(
    ("name", "published_millions"),
    [
        ("beit3-base-patch16-224", None),
        ("beit3-base-patch16-224-itc", 222),
        ("beit3-large-patch16-224", None),
        ("beit3-large-patch16-224-itc", 675),
        ("beit3-base-as-in-the-paper", None),
    ],
)
def test_published_sizes_have_their_number_of_parameters(name: str, published_millions: int | None) -> None:
    architecture, size = find_size(name)
    with no_weights():
        ours = num_parameters(MultimodalModel(architecture.model(HubConfigs(size.config)), 64010))
    assert ours == size.parameters
    if published_millions is not None:
        width = size.config.get("hidden_size", 768)
        assert round((ours + 4 * width) / 1e6) == published_millions


def test_the_pretraining_heads_make_276_million() -> None:
    """A head over the words and one over the 8,192 codes of pictures, beside the encoder of the base size."""
    encoder = BEIT3.sizes["beit3-base-patch16-224"].parameters
    assert (encoder + 769 * 64010 + 769 * 8192) // 10**6 == 276
