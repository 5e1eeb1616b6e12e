"""I3D classifiers (``model_type: i3d``).

No library publishes configs for them: this is the format that we read and write, with the tensor names of the common
port of the published weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.i3d import I3dConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.presets.video_reader import frame_processor, video_reader
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_BRANCHES = {"one": "b0", "reduce3": "b1a", "three": "b1b", "reduce5": "b2a", "five": "b2b", "pooled": "b3b"}
_STEM = {"stem": "Conv3d_1a_7x7", "reduce": "Conv3d_2b_1x1", "conv": "Conv3d_2c_3x3"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A video stream without a backbone and a ``class`` head."""
    config = configs.config
    encoder = {
        "use": "i3d",
        "width": config.get("hidden_size", 1024),
        "image_size": config.get("image_size", 224),
        "num_frames": config.get("num_frames", 64),
        "norm_gain": config.get("norm_gain", False),
    }
    reader = video_reader(configs.preprocessor, encoder["image_size"], encoder["num_frames"], "i3d")
    head = {"use": "class", "stream": "video", "classes": class_names(config)}
    return {
        "streams": {"video": {"modality": "video", "encoder": encoder, "reader": {**reader, "sampling": "clip"}}},
        "backbone": "none",
        "heads": {"class": head},
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the common port of the published weights."""
    ours = "streams.video.encoder."
    units = {ours + mine: theirs for mine, theirs in _STEM.items()}
    units |= {f"{ours}mixed.{{p}}.{mine}": f"Mixed_{{p}}.{theirs}" for mine, theirs in _BRANCHES.items()}
    width = _encoder(model).width
    rules = [
        rule
        for mine, theirs in units.items()
        for rule in (
            Rule(f"{mine}.conv.weight", f"{theirs}.conv3d.weight"),
            Rule(f"{mine}.norm.{{q}}", f"{theirs}.bn.{{q}}"),
        )
    ]
    head = "heads.class."
    rules.append(Rule(head + "weight", "logits.conv3d.weight", Reshape((-1, width), (-1, width, 1, 1, 1))))
    rules.append(Rule(head + "bias", "logits.conv3d.bias"))
    return NameTable(rules, optional=(ours + "{rest}.num_batches_tracked",))


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder = _encoder(model)
    config = {
        "model_type": "i3d",
        "hidden_size": encoder.width,
        "image_size": encoder.image_size,
        "num_frames": encoder.num_frames,
        "norm_gain": encoder.norm_gain,
        **label_config(model.heads["class"].classes),
    }
    processor = frame_processor(model.streams["video"].reader)
    return {"config.json": config, "preprocessor_config.json": processor}


def _encoder(model: ModelConfig) -> I3dConfig:
    encoder = model.streams["video"].encoder if list(model.streams) == ["video"] else None
    if not isinstance(encoder, I3dConfig) or [head.use for head in model.heads.values()] != ["class"]:
        raise ConfigError("i3d: found a model of other parts, expected one video stream with 'i3d' and a class head")
    return encoder


I3D = Architecture(
    "i3d",
    ("i3d",),
    "I3D, arXiv 1705.07750, section 2.4",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # Published: 12M; 12.3M are the network below its classifier of 400 (0.41M).
        "i3d-rgb-k400": Size(
            {"model_type": "i3d", "num_labels": 400},
            12_689_984,
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
        ),
    },
)
"""See the module."""
