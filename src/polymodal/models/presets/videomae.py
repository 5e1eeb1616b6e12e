"""VideoMAE checkpoints (``model_type: videomae``): encoder, classifier, and the whole of masked pretraining."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.tubelet import TubeletConfig
from polymodal.models.presets.activations import activation
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.stacks import stack_config
from polymodal.models.presets.video_reader import frame_processor, video_reader
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_PARTS = {
    "attention_norm": "layernorm_before",
    "attention.k_proj": "attention.attention.key",
    "attention.out_proj": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
}
_BIASED = {"attention.q_proj": ("query.weight", "q_bias"), "attention.v_proj": ("value.weight", "v_bias")}
"""Weight and bias of queries and values, which are stored apart."""
_CLASSIFIER, _PRETRAINING = "VideoMAEForVideoClassification", "VideoMAEForPreTraining"
"""Classes of the reference library; without one, the encoder alone."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A video stream without a backbone; a ``class`` or a ``masked_patches`` head where the checkpoint has one."""
    config = configs.config
    require(config, "videomae", num_channels=3, qv_bias=True)
    is_classifier, is_pretraining = _CLASSIFIER in configs.classes, _PRETRAINING in configs.classes
    by_mean = config.get("use_mean_pooling", True)
    encoder = {
        "use": "tubelet",
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 16),
        "tubelet_size": config.get("tubelet_size", 2),
        "num_frames": config.get("num_frames", 16),
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "activation": activation(config.get("hidden_act", "gelu")),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "positions": "sequence",
        "key_bias": False,
        "norm": ("pooled" if is_classifier else "none") if by_mean else "features",
        "pool": "mean" if by_mean else "first",
    }
    heads: dict[str, Any] = {}
    if is_classifier:
        heads["class"] = {"use": "class", "stream": "video", "classes": class_names(config)}
    if is_pretraining:
        heads["masked_patches"] = {
            "use": "masked_patches",
            "stream": "video",
            "width": config.get("decoder_hidden_size", 384),
            "depth": config.get("decoder_num_hidden_layers", 4),
            "heads": config.get("decoder_num_attention_heads", 6),
            "mlp_dim": config.get("decoder_intermediate_size", 1536),
            "targets": "normalised" if config.get("norm_pix_loss", True) else "values",
        }
    reader = video_reader(configs.preprocessor, encoder["image_size"], encoder["num_frames"], "videomae")
    stream = {"modality": "video", "encoder": encoder, "reader": reader}
    return {"streams": {"video": stream}, "backbone": "none", "heads": heads}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``VideoMAEModel``, below ``videomae.`` in the classes that wrap it."""
    encoder = _encoder(model)
    tubelet = (encoder.width, 3, encoder.tubelet_size, encoder.patch_size, encoder.patch_size)
    ours = "streams.video.encoder."
    trunk = NameTable(
        [
            Rule(
                ours + "tubelet_proj.weight",
                "embeddings.patch_embeddings.projection.weight",
                Reshape((encoder.width, -1), tubelet),
            ),
            Rule(ours + "tubelet_proj.bias", "embeddings.patch_embeddings.projection.bias"),
            Rule(ours + "transformer.final_norm.{p}", "layernorm.{p}"),
            *_blocks(ours + "transformer.blocks", "encoder.layer"),
        ]
    )
    wraps = bool(model.heads) or any(name.startswith("videomae.") for name in stored)
    head = "heads.masked_patches."
    rules = [
        Rule(ours + "pooled_norm.{p}", "fc_norm.{p}"),
        Rule("heads.class.{rest}", "classifier.{rest}"),
        Rule(head + "in_proj.{p}", "encoder_to_decoder.{p}"),
        Rule(head + "mask_token", "mask_token", Reshape((-1,), (1, 1, -1))),
        Rule(head + "transformer.final_norm.{p}", "decoder.norm.{p}"),
        Rule(head + "out.{p}", "decoder.head.{p}"),
        *_blocks(head + "transformer.blocks", "decoder.decoder_layers"),
    ]
    return (trunk.below("videomae.") if wraps else trunk) + NameTable(rules)


def _blocks(ours: str, hub: str) -> list[Rule]:
    return block_rules(ours, hub, _PARTS) + [
        Rule(f"{ours}.{{i}}.{mine}.{kind}", f"{hub}.{{i}}.attention.attention.{stored}")
        for mine, both in _BIASED.items()
        for kind, stored in zip(("weight", "bias"), both, strict=True)
    ]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder, heads = _encoder(model), {head.use: head for head in model.heads.values()}
    config: dict[str, Any] = {
        "model_type": "videomae",
        "architectures": ["VideoMAEModel"],
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "tubelet_size": encoder.tubelet_size,
        "num_frames": encoder.num_frames,
        **stack_config(encoder),
        "qv_bias": True,
        "use_mean_pooling": encoder.pool == "mean",
    }
    if "class" in heads:
        config |= {"architectures": [_CLASSIFIER], **label_config(heads["class"].classes)}
    if "masked_patches" in heads:
        decoder = heads["masked_patches"]
        config |= {
            "architectures": [_PRETRAINING],
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": decoder.mlp_dim or 4 * decoder.width,
            "norm_pix_loss": decoder.targets == "normalised",
        }
    processor = frame_processor(model.streams["video"].reader)
    return {"config.json": config, "preprocessor_config.json": processor}


def _encoder(model: ModelConfig) -> TubeletConfig:
    encoder = model.streams["video"].encoder if list(model.streams) == ["video"] else None
    if not isinstance(encoder, TubeletConfig):
        raise ConfigError(
            "videomae: found a model of other parts, expected one video stream with the encoder 'tubelet'"
        )
    return encoder


_K400 = {"architectures": [_CLASSIFIER], "num_labels": 400, "use_mean_pooling": True}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _size(parameters: int, **config: Any) -> Size:
    return Size({"model_type": "videomae", **config}, parameters, _IMAGENET)


VIDEOMAE = Architecture(
    "videomae",
    ("videomae",),
    "VideoMAE, arXiv 2203.12602, section 3.3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # The paper and its model zoo state 22M, 87M, 305M for classifiers.
        "videomae-base": _size(94_210_944, architectures=[_PRETRAINING], use_mean_pooling=False),
        "videomae-small-kinetics": _size(
            22_033_936, **_K400, hidden_size=384, num_attention_heads=6, intermediate_size=1536
        ),
        "videomae-base-kinetics": _size(86_534_800, **_K400),
        "videomae-large-kinetics": _size(304_270_736, **_K400, **_LARGE),
    },
)
"""See the module."""
