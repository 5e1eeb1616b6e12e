"""X-CLIP checkpoints (``model_type: xclip``): videos and texts that videos prompt."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.space_time import SpaceTimeConfig
from polymodal.models.heads.prompted_pairs import PromptedPairsConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.clip import from_log_scale, own_rows, part_config, text_encoder, text_reader, tower_config
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.presets.towers import text_names
from polymodal.models.presets.video_reader import frame_processor, video_reader
from polymodal.models.weights import TRANSPOSED, HubConfigs, NameTable, Reshape, Rule

_VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "mit_hidden_size": 512, "mit_intermediate_size": 2048, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 8,
    "image_size": 224, "patch_size": 32, "num_frames": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_BLOCK = {
    "attention_norm": "layer_norm1",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
_MESSAGES = {
    "time_proj": "message_fc",
    "time_norm": "message_ln",
    **{f"time_attention.{part}": f"message_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")},
}
_PROMPT = {
    **{f"attention.{part}": f"cross_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")},
    "attention.out_proj": "cross_attn.proj",
    "attention_norm": "norm1",
    "mlp_norm": "norm3",
    "mlp.up_proj": "mlp.0",
    "mlp.down_proj": "mlp.3",
}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Video and text stream, and the head that compares them."""
    config = configs.config
    vision = {**_VISION, **part_config(config, "vision", "xclip")}
    require(vision, "xclip", num_channels=3, drop_path_rate=0.0)
    dim = config.get("projection_dim", 512)
    require(vision, "xclip", mit_hidden_size=dim)
    text = part_config(config, "text", "xclip")
    texts = text_encoder({"eos_token_id": 2, **text})
    # Whatever the config says, the reference pools at the highest id.
    texts |= {"pool": "highest", "eos_id": None}
    encoder = {
        "use": "space_time",
        "attention": "messages",
        "features": "frames",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_frames": vision["num_frames"],
        **stack_fields(vision, "xclip"),
        "patch_bias": False,
        "embed_norm": True,
        "final_norm": False,
    }
    head = {
        "use": "prompted_pairs",
        "dim": dim,
        "depth": vision["mit_num_hidden_layers"],
        "heads": vision["mit_num_attention_heads"],
        "mlp_dim": vision["mit_intermediate_size"],
        "prompt_depth": config.get("prompt_layers", 2),
        "prompt_heads": config.get("prompt_num_attention_heads", 8),
        "prompt_share": config.get("prompt_alpha", 0.1),
        "activation": activation(vision["hidden_act"]),
        "prompt_activation": activation(config.get("prompt_hidden_act", "quick_gelu")),
        "norm_eps": vision["layer_norm_eps"],
        "temperature": from_log_scale(config.get("logit_scale_init_value", 2.6592)),
    }
    require(text, "xclip text", layer_norm_eps=vision["layer_norm_eps"])
    reader = video_reader(configs.preprocessor, vision["image_size"], vision["num_frames"], "xclip")
    streams = {
        "video": {"modality": "video", "encoder": encoder, "reader": reader},
        "text": {"modality": "text", "encoder": texts, "reader": text_reader(configs, texts["max_tokens"])},
    }
    return {"streams": streams, "backbone": "none", "heads": {"prompted_pairs": head}, **own_rows(streams)}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``XCLIPModel``."""
    video, head = "streams.video.encoder.", "heads.prompted_pairs."
    dim = _parts(model)[1].dim
    return text_names("streams.text.encoder.", "text_model.") + NameTable(
        [
            Rule(video + "patch_embed.{p}", "vision_model.embeddings.patch_embedding.{p}"),
            Rule(video + "cls_token", "vision_model.embeddings.class_embedding"),
            Rule(video + "positions.weight", "vision_model.embeddings.position_embedding.weight"),
            Rule(video + "embed_norm.{p}", "vision_model.pre_layernorm.{p}"),
            *block_rules(video + "blocks", "vision_model.encoder.layers", {**_BLOCK, **_MESSAGES}),
            Rule(head + "frame_norm.{p}", "vision_model.post_layernorm.{p}"),
            Rule(head + "frame_proj.{p}", "visual_projection.{p}"),
            Rule(head + "frame_positions", "mit.position_embedding", Reshape((-1, dim), (1, -1, dim))),
            *block_rules(head + "integration.blocks", "mit.encoder.layers", _BLOCK),
            Rule(head + "patch_norm.{p}", "prompts_visual_layernorm.{p}"),
            Rule(head + "patch_proj.weight", "prompts_visual_projection", TRANSPOSED),
            Rule(head + "text_proj.{p}", "text_projection.{p}"),
            Rule(head + "prompt_norm.{p}", "prompts_generator.layernorm.{p}"),
            *block_rules(head + "prompts", "prompts_generator.decoder", _PROMPT),
            Rule(head + "prompt_share", "prompts_generator.alpha"),
            Rule(head + "log_scale", "logit_scale"),
        ],
        ignored=("vision_model.embeddings.position_ids",),
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder, head = _parts(model)
    text = tower_config("text", model.streams["text"].encoder)
    if getattr(model.streams["text"].reader, "tokenizer", None) is None:
        text["vocab_size"] = vocabulary.size
    vision = {
        "model_type": "xclip_vision_model",
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_frames": encoder.num_frames,
        **stack_config(encoder),
        "mit_hidden_size": head.dim,
        "mit_num_hidden_layers": head.depth,
        "mit_num_attention_heads": head.heads,
        "mit_intermediate_size": head.mlp_dim or 4 * head.dim,
    }
    config = {
        "model_type": "xclip",
        "architectures": ["XCLIPModel"],
        "projection_dim": head.dim,
        "prompt_layers": head.prompt_depth,
        "prompt_num_attention_heads": head.prompt_heads,
        "prompt_alpha": head.prompt_share,
        "prompt_hidden_act": hub_activation(head.prompt_activation),
        "logit_scale_init_value": -math.log(head.temperature),
        "vision_config": vision,
        "text_config": {**text, "model_type": "xclip_text_model"},
    }
    processor = frame_processor(model.streams["video"].reader)
    return {"config.json": config, "preprocessor_config.json": processor}


def _parts(model: ModelConfig) -> tuple[SpaceTimeConfig, PromptedPairsConfig]:
    encoder = model.streams["video"].encoder if set(model.streams) == {"video", "text"} else None
    head = model.heads.get("prompted_pairs")
    if not isinstance(encoder, SpaceTimeConfig) or not isinstance(head, PromptedPairsConfig):
        raise ConfigError(
            "xclip: found a model of other parts, expected the streams video ('space_time') and text, and a "
            "prompted_pairs head"
        )
    return encoder, head


_L14: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "mit_hidden_size": 768, "mit_intermediate_size": 3072,
}  # fmt: skip
_L14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def _size(parameters: int, vision: dict[str, Any], text: dict[str, Any], dim: int = 512) -> Size:
    config = {"model_type": "xclip", "architectures": ["XCLIPModel"], "projection_dim": dim}
    return Size({**config, "vision_config": vision, "text_config": text}, parameters)


XCLIP = Architecture(
    "xclip",
    ("xclip",),
    "X-CLIP, arXiv 2208.02816, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "xclip-base-patch32": _size(196_585_729, {}, {}),
        "xclip-base-patch16": _size(194_929_153, {"patch_size": 16}, {}),
        "xclip-large-patch14": _size(575_673_601, _L14, _L14_TEXT, 768),
    },
)
"""See the module."""
