"""PatchTST checkpoints (``model_type: patchtst``): encoder and classifier of sensor recordings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.patchtst import PatchtstConfig
from polymodal.models.presets.activations import activation, hub_activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.weights import HubConfigs, NameTable, Rule

_PARTS = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "mlp.up_proj": "ff.0",
    "mlp.down_proj": "ff.3",
}
_NORMS = {"batch": ("batchnorm", ".batchnorm"), "layer": ("layernorm", "")}
_CLASSIFIER = "PatchTSTForClassification"
_SCALINGS = {"std": "std", "mean": "mean", True: "mean", None: "none", False: "none"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A sensor stream without a backbone; a ``class`` head where the checkpoint has one.

    Heads that forecast, regress or rebuild are not read: the encoder is.
    """
    config = configs.config
    require(
        config, "patchtst", share_embedding=True, channel_attention=False, bias=True, use_cls_token=False,
        scaling=tuple(_SCALINGS), norm_type=("batchnorm", "layernorm"),
    )  # fmt: skip
    is_classifier = _CLASSIFIER in configs.classes
    if is_classifier:
        require(config, "patchtst", pooling_type="mean")
    encoder = {
        "use": "patchtst",
        "num_channels": config.get("num_input_channels", 1),
        "context_length": config.get("context_length", 32),
        "patch_size": config.get("patch_length", 1),
        "stride": config.get("patch_stride", 1),
        "width": config.get("d_model", 128),
        "depth": config.get("num_hidden_layers", 3),
        "heads": config.get("num_attention_heads", 4),
        "mlp_dim": config.get("ffn_dim", 512),
        "activation": activation(config.get("activation_function", "gelu")),
        "norm_eps": config.get("norm_eps", 1e-5),
        "norm": "batch" if config.get("norm_type", "batchnorm") == "batchnorm" else "layer",
        "pre_norm": config.get("pre_norm", True),
        "positions": {"sincos": "sincos", "random": "learned"}[config.get("positional_encoding_type", "sincos")],
        "scaling": _SCALINGS[config.get("scaling", "std")],
        "pool": "channels" if is_classifier else "mean",
    }
    heads = {}
    if is_classifier:
        # These checkpoints count targets and name none.
        labels = class_names({"num_labels": config.get("num_targets", 1), **_labels(config)})
        heads["class"] = {"use": "class", "stream": "sensor", "classes": labels}
    return {
        "streams": {"sensor": {"modality": "sensor", "encoder": encoder}},
        "backbone": "none",
        "heads": heads,
    }


def _labels(config: Any) -> dict[str, Any]:
    by_id = config.get("id2label") or {}
    return {"id2label": by_id} if len(by_id) == config.get("num_targets", 1) else {}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``PatchTSTModel``, below ``model.`` in the classes that wrap it."""
    ours = "streams.sensor.encoder."
    norm = _NORMS[_encoder(model).norm][1]
    table = NameTable(
        [
            Rule(ours + "patch_proj.{p}", "encoder.embedder.input_embedding.{p}"),
            Rule(ours + "position_codes", "encoder.positional_encoder.position_enc"),
            *block_rules(ours + "transformer.blocks", "encoder.layers", _PARTS),
            Rule(
                ours + "transformer.blocks.{i}.attention_norm.{p}", "encoder.layers.{i}.norm_sublayer1" + norm + ".{p}"
            ),
            Rule(ours + "transformer.blocks.{i}.mlp_norm.{p}", "encoder.layers.{i}.norm_sublayer3" + norm + ".{p}"),
        ]
    )
    wraps = bool(model.heads) or any(name.startswith("model.") for name in stored)
    head = NameTable([Rule("heads.class.{p}", "head.linear.{p}")], ignored=() if model.heads else ("head.{rest}",))
    return (table.below("model.") if wraps else table) + head


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``."""
    encoder = _encoder(model)
    config: dict[str, Any] = {
        "model_type": "patchtst",
        "architectures": ["PatchTSTModel"],
        "num_input_channels": encoder.num_channels,
        "context_length": encoder.context_length,
        "patch_length": encoder.patch_size,
        "patch_stride": encoder.stride,
        "d_model": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "ffn_dim": encoder.mlp_dim or 4 * encoder.width,
        "activation_function": hub_activation(encoder.activation),
        "norm_eps": encoder.norm_eps,
        "norm_type": _NORMS[encoder.norm][0],
        "pre_norm": encoder.pre_norm,
        "positional_encoding_type": "random" if encoder.positions == "learned" else "sincos",
        "scaling": None if encoder.scaling == "none" else encoder.scaling,
    }
    for head in model.heads.values():
        config |= {"architectures": [_CLASSIFIER], "num_targets": len(head.classes), **label_config(head.classes)}
    return {"config.json": config}


def _encoder(model: ModelConfig) -> PatchtstConfig:
    encoder = model.streams["sensor"].encoder if list(model.streams) == ["sensor"] else None
    if not isinstance(encoder, PatchtstConfig) or {head.use for head in model.heads.values()} - {"class"}:
        raise ConfigError("patchtst: found a model of other parts, expected one sensor stream with 'patchtst'")
    return encoder


_GRANITE = {
    "model_type": "patchtst", "architectures": ["PatchTSTModel"], "num_input_channels": 7, "context_length": 512,
    "patch_length": 12, "patch_stride": 12, "d_model": 128, "num_hidden_layers": 3, "num_attention_heads": 16,
    "ffn_dim": 512,
}  # fmt: skip

PATCHTST = Architecture(
    "patchtst",
    ("patchtst",),
    "PatchTST, arXiv 2211.14730, section 3.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # The encoder; the published forecaster adds its head (0.6M in all).
        "patchtst-etth1": Size(_GRANITE, 596_480),
    },
)
"""See the module."""
