"""T5 and Flan-T5 checkpoints (``model_type: t5``): an encoder-decoder with relative positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.encoder_decoder import EncoderDecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.heads.next_token import NextTokenConfig
from polymodal.models.layers import TransformerConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.language import stop_ids, tokenizer_of
from polymodal.models.weights import HubConfigs, NameTable, Rule
from polymodal.models.weights.names import Same

_DEFAULTS = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
_FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}
"""What the published name of a feed-forward block means: activation, gated."""
_MAX_TOKENS = 2048
"""Relative positions know no longest sequence; question and answer together are held to this."""
_ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}


@dataclass(frozen=True, slots=True)
class Copied(Same):
    """A stored tensor that another parameter takes as well: this one gets memory of its own, and trains alone."""

    def load(self, stored: Tensor) -> Tensor:
        """A copy."""
        return stored.clone()


COPY = Copied()


def t5_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Data of the backbone, without its end tokens, from a T5 config.

    Raises:
        ConfigError: if the feed-forward block is none that we build.
    """
    value = {**_DEFAULTS, **config}
    if value["feed_forward_proj"] not in _FEED_FORWARD:
        raise ConfigError(
            f"t5: found feed_forward_proj: {value['feed_forward_proj']!r}, expected one of {sorted(_FEED_FORWARD)}"
        )
    activation, gated = _FEED_FORWARD[value["feed_forward_proj"]]
    stack = {
        "width": value["d_model"],
        "depth": value["num_layers"],
        "heads": value["num_heads"],
        "head_dim": value["d_kv"],
        "mlp_dim": value["d_ff"],
        "norm": "rms",
        "norm_eps": value["layer_norm_epsilon"],
        "activation": activation,
        "gated": gated,
        "bias": False,
        "relative_buckets": value["relative_attention_num_buckets"],
        "relative_distance": value["relative_attention_max_distance"],
        "attention_scale": 1.0,
        "dropout": value["dropout_rate"],
    }
    depth = config.get("num_decoder_layers") or value["num_layers"]
    return {
        "use": "encoder_decoder",
        "encoder": stack,
        "decoder": {**stack, "depth": depth},
        "max_tokens": _MAX_TOKENS,
        "chat": "t5",
    }


def t5_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Data of the head: the first models share and scale it, those from version 1.1 on do neither."""
    is_first = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    if not is_first:
        return {"use": "next_token", "tied": False}
    return {"use": "next_token", "scale": {**_DEFAULTS, **config}["d_model"] ** -0.5}


def t5_names(backbone: EncoderDecoderConfig, stored: Collection[str], tied: bool, head: str) -> NameTable:
    """Names of ``T5ForConditionalGeneration``.

    Args:
        backbone: the backbone.
        stored: names of the checkpoint, or () when exporting.
        tied: whether the head shares the embedding.
        head: path of the head in our model (``heads.text``).
    """
    rules = [Rule("backbone.embed_tokens.weight", "shared.weight")]
    for side in ("encoder", "decoder"):
        ours, theirs = f"backbone.{side}.transformer.", f"{side}."
        block, layer = ours + "blocks.{i}.", theirs + "block.{i}.layer."
        last = 2 if side == "decoder" else 1
        rules += [
            Rule(ours + "relative.weight", theirs + "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            Rule(ours + "final_norm.weight", theirs + "final_layer_norm.weight"),
            Rule(block + "attention_norm.weight", layer + "0.layer_norm.weight"),
            Rule(block + "mlp_norm.weight", layer + f"{last}.layer_norm.weight"),
            Rule(block + "mlp.gate_proj.weight", layer + f"{last}.DenseReluDense.wi_0.weight"),
            Rule(
                block + "mlp.up_proj.weight",
                layer + f"{last}.DenseReluDense.{'wi_1' if backbone.encoder.gated else 'wi'}.weight",
            ),
            Rule(block + "mlp.down_proj.weight", layer + f"{last}.DenseReluDense.wo.weight"),
            *(
                Rule(f"{block}attention.{mine}.weight", f"{layer}0.SelfAttention.{name}.weight")
                for mine, name in _ATTENTION.items()
            ),
        ]
    cross = "backbone.decoder.transformer.blocks.{i}.cross_"
    rules.append(Rule(cross + "norm.weight", "decoder.block.{i}.layer.1.layer_norm.weight"))
    rules += [
        Rule(f"{cross}attention.{mine}.weight", f"decoder.block.{{i}}.layer.1.EncDecAttention.{name}.weight")
        for mine, name in _ATTENTION.items()
    ]
    # The first files hold the embedding several times, and a bias for the cross-attention that nothing ever read.
    copies = (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )
    if tied:
        return NameTable(rules, ignored=(*copies, "lm_head.weight"))
    # The reference library ties what it saves, whatever was trained: one matrix then stands for both.
    is_stored = not stored or any(name.endswith("lm_head.weight") for name in stored)
    rules.append(
        Rule(head + ".proj.weight", "lm_head.weight")
        if is_stored
        else Rule(head + ".proj.weight", "shared.weight", COPY)
    )
    return NameTable(rules, ignored=copies)


def t5_config(backbone: EncoderDecoderConfig, head: NextTokenConfig, rows: int) -> dict[str, Any]:
    """Config data of a backbone and its head.

    Raises:
        ConfigError: if T5 cannot say them.
    """
    encoder, decoder = backbone.encoder, backbone.decoder
    if encoder != decoder.model_copy(update={"depth": encoder.depth}) or encoder.relative_buckets is None:
        raise ConfigError(
            "t5: found stacks that differ or have no relative positions, expected equal ones but in depth"
        )
    return {
        "vocab_size": rows,
        "d_model": encoder.width,
        "d_kv": encoder.size_of_head,
        "d_ff": encoder.mlp_dim or 4 * encoder.width,
        "num_layers": encoder.depth,
        "num_decoder_layers": decoder.depth,
        "num_heads": encoder.heads,
        "relative_attention_num_buckets": encoder.relative_buckets,
        "relative_attention_max_distance": encoder.relative_distance,
        "dropout_rate": encoder.dropout,
        "layer_norm_epsilon": encoder.norm_eps,
        "feed_forward_proj": _feed_forward(encoder),
        "tie_word_embeddings": head.tied,
        "is_encoder_decoder": True,
    }


def _feed_forward(stack: TransformerConfig) -> str:
    found = [name for name, kind in _FEED_FORWARD.items() if kind == (stack.activation, stack.gated)]
    if not found:
        raise ConfigError(f"t5: found activation {stack.activation}, gated {stack.gated}; expected one of T5's")
    return found[0]


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An encoder-decoder without streams."""
    config = configs.config
    rows = int(config.get("vocab_size", _DEFAULTS["vocab_size"]))
    return {
        "streams": {},
        "backbone": {**t5_backbone(config), "stop_ids": stop_ids(configs)},
        "heads": {"text": t5_head(config)},
        "tokenizer": tokenizer_of(configs, rows),
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """See :func:`t5_names`."""
    name, head = next(iter(model.heads.items()))
    backbone = model.backbone
    assert isinstance(backbone, EncoderDecoderConfig)
    return t5_names(backbone, stored, head.tied, f"heads.{name}")


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``generation_config.json``."""
    backbone, heads = model.backbone, list(model.heads.values())
    if (
        model.streams
        or not isinstance(backbone, EncoderDecoderConfig)
        or [head.use for head in heads] != ["next_token"]
    ):
        raise ConfigError("t5: found other parts, expected an encoder_decoder backbone with a next_token head alone")
    special = {
        "pad_token_id": vocabulary.pad_id,
        "eos_token_id": vocabulary.eos_id,
        "decoder_start_token_id": vocabulary.controls.get("<pad>", vocabulary.pad_id),
    }
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        **special,
        **t5_config(backbone, heads[0], model.tokenizer.rows or vocabulary.size),
    }
    return {"config.json": config, "generation_config.json": special}


def _size(width: int, depth: int, heads: int, ff: int, parameters: int, **more: Any) -> Size:
    own = {"d_model": width, "num_layers": depth, "num_heads": heads, "d_ff": ff, **more}
    return Size({"model_type": "t5", **_DEFAULTS, **own}, parameters)


_FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5 = Architecture(
    "t5",
    ("t5",),
    "T5, arXiv 1910.10683, section 2.1; version 1.1 as in arXiv 2002.05202",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # As published, rounded: 60M, 220M, 770M, 3B, 11B; Flan 80M, 250M, 780M, 3B, 11B.
        "t5-small": _size(512, 6, 8, 2048, 60_506_624),
        "t5-base": _size(768, 12, 12, 3072, 222_903_552),
        "t5-large": _size(1024, 24, 16, 4096, 737_668_096),
        "t5-3b": _size(1024, 24, 32, 16_384, 2_851_598_336, d_kv=128),
        "t5-11b": _size(1024, 24, 128, 65_536, 11_307_321_344, d_kv=128),
        "flan-t5-small": _size(512, 8, 6, 1024, 76_961_152, **_FLAN),
        "flan-t5-base": _size(768, 12, 12, 2048, 247_577_856, **_FLAN),
        "flan-t5-large": _size(1024, 24, 16, 2816, 783_150_080, **_FLAN),
        "flan-t5-xl": _size(2048, 24, 32, 5120, 2_849_757_184, **_FLAN),
        "flan-t5-xxl": _size(4096, 24, 64, 10_240, 11_135_332_352, **_FLAN),
    },
    float32=("wo",),
)
"""See the module."""
