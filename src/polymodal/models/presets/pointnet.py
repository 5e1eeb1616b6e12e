"""PointNet classifiers (``model_type: pointnet``).

No library publishes configs for them: this is the format that we read and write, with the tensor names of the common
port.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.pointnet_aligned import PointnetAlignedConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.weights import HubConfigs, NameTable, Rule

_FIELDS = ("align", "first", "second", "whole", "width", "dropout", "colour", "num_points")
_PUBLISHED = {"width": 256, "dropout": 0.3, "num_points": 1024}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A points stream without a backbone and a ``class`` head; ``config.json`` holds the encoder's own keys."""
    config = configs.config
    encoder = {"use": "pointnet_aligned", **_PUBLISHED, **{key: config[key] for key in _FIELDS if key in config}}
    head = {"use": "class", "stream": "points", "classes": class_names(config)}
    return {
        "streams": {"points": {"modality": "points", "encoder": encoder}},
        "backbone": "none",
        "heads": {"class": head},
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Our own names, without the stream's."""
    return NameTable(
        [
            Rule("streams.points.encoder.{rest}", "{rest}"),
            Rule("heads.class.{p}", "classifier.{p}"),
        ]
    )


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``."""
    encoder = model.streams["points"].encoder if list(model.streams) == ["points"] else None
    if not isinstance(encoder, PointnetAlignedConfig) or [head.use for head in model.heads.values()] != ["class"]:
        raise ConfigError(
            "pointnet: found a model of other parts, expected a points stream with 'pointnet_aligned' and a class head"
        )
    data = encoder.to_data()
    fields = {key: data[key] for key in _FIELDS}
    return {"config.json": {"model_type": "pointnet", **fields, **label_config(model.heads["class"].classes)}}


POINTNET = Architecture(
    "pointnet",
    ("pointnet",),
    "PointNet, arXiv 1612.00593, section 4.2 and supplementary C",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        # The paper's table 6: 3.5M, and 0.8M without alignment.
        "pointnet-modelnet40": Size({"model_type": "pointnet", "num_labels": 40}, 3_480_049),
        "pointnet-vanilla-modelnet40": Size({"model_type": "pointnet", "num_labels": 40, "align": False}, 819_624),
    },
)
"""See the module."""
