"""The same models in ``transformers``, with the same weights."""

from __future__ import annotations

from typing import Any

from polymodal.models.compose import MultimodalModel
from polymodal.models.layers.transformer import TransformerConfig

_LLAMA = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_SIGLIP = {
    **{f"attention.{name}_proj": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def _text_config(network: MultimodalModel) -> dict[str, Any]:
    stack = network.config.backbone.transformer
    return {
        "vocab_size": network.decoder.embed_tokens.num_embeddings,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp_dim,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.num_kv_heads,
        "max_position_embeddings": network.config.backbone.max_tokens,
        "rms_norm_eps": stack.norm_eps,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _blocks(
    stack: TransformerConfig, ours: str, theirs: str, parts: dict[str, str], leaves: tuple[str, ...]
) -> dict[str, str]:
    return {
        f"{ours}.blocks.{layer}.{mine}.{leaf}": f"{theirs}.layers.{layer}.{other}.{leaf}"
        for layer in range(stack.depth)
        for mine, other in parts.items()
        for leaf in leaves
    }


def _text_names(network: MultimodalModel, prefix: str) -> dict[str, str]:
    return {
        "backbone.embed_tokens.weight": f"{prefix}.embed_tokens.weight",
        "backbone.transformer.final_norm.weight": f"{prefix}.norm.weight",
        "heads.answer.proj.weight": "lm_head.weight",
        **_blocks(network.config.backbone.transformer, "backbone.transformer", prefix, _LLAMA, ("weight",)),
    }


def _filled(model: Any, network: MultimodalModel, names: dict[str, str], spare: str = "") -> Any:
    """Load our weights under their names; only what begins with ``spare`` may stay as it was.

    Raises:
        ValueError: if a weight of either side has no counterpart.
    """
    state = {names[name]: tensor.clone() for name, tensor in network.state_dict().items()}
    found = model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not spare or not name.startswith(spare)]
    if missing or found.unexpected_keys:
        raise ValueError(f"weights without a counterpart: {missing[:3]} {found.unexpected_keys[:3]}, expected none")
    return model


def llama_like(network: MultimodalModel) -> Any:
    """``LlamaForCausalLM`` with the weights of a text model of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_text_config(network), attn_implementation="sdpa")
    return _filled(LlamaForCausalLM(config).float(), network, _text_names(network, "model"))


def llava_like(network: MultimodalModel, media_id: int) -> Any:
    """``LlavaForConditionalGeneration`` over a SigLIP tower, its tower frozen, with the weights of a model of ours.

    Args:
        network: a vision transformer whose ``layer`` is -2, an MLP of two layers, a Llama-shaped decoder.
        media_id: the placeholder's id.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vit = network.config.streams["image"].encoder
    vision = SiglipVisionConfig(
        hidden_size=vit.width,
        intermediate_size=vit.mlp_dim or 4 * vit.width,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.heads,
        image_size=vit.image_size,
        patch_size=vit.patch_size,
        layer_norm_eps=vit.norm_eps,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_config(network)),
        image_token_index=media_id,
        vision_feature_layer=vit.layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlavaForConditionalGeneration(config).float()
    tower, trunk = "model.vision_tower", "streams.image.encoder.trunk"
    names = _text_names(network, "model.language_model")
    for leaf in ("weight", "bias"):
        names[f"{trunk}.patch_embed.{leaf}"] = f"{tower}.embeddings.patch_embedding.{leaf}"
        for layer in (0, 1):
            names[f"streams.image.connector.stack.layers.{layer}.{leaf}"] = (
                f"model.multi_modal_projector.linear_{layer + 1}.{leaf}"
            )
    names[f"{trunk}.learned_positions.weight"] = f"{tower}.embeddings.position_embedding.weight"
    names |= _blocks(vit.stack(vit.depth), f"{trunk}.transformer", f"{tower}.encoder", _SIGLIP, ("weight", "bias"))
    # Features are taken before the last block: ours does not build it, theirs has it.
    _filled(model, network, names, spare=tower)
    model.model.vision_tower.requires_grad_(False)
    return model
