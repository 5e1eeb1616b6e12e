"""ResNet checkpoints (``model_type: resnet``) as an image stream, with a classifier where there is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.resnet import ResnetConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.image_reader import image_preprocessor, image_reader
from polymodal.models.presets.labels import class_names, label_config
from polymodal.models.weights import HubConfigs, NameTable, Rule

_CLASSIFIER = "ResNetForImageClassification"
_SIZE_PX = 224
"""The network takes any size; that of its training, for checkpoints that do not say how pictures are prepared."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream without a backbone, and a ``class`` head where the checkpoint has one."""
    config = configs.config
    require(config, "resnet", num_channels=3, hidden_act="relu", downsample_in_first_stage=False)
    widths = list(config.get("hidden_sizes", (256, 512, 1024, 2048)))
    if any(later != 2 * earlier for earlier, later in pairwise(widths)):
        raise ConfigError(f"resnet: found hidden_sizes {widths}, expected each twice the one before")
    reader = image_reader(configs.preprocessor, _SIZE_PX, "ConvNextImageProcessor")
    encoder = {
        "use": "resnet",
        "image_size": reader["size_px"],
        "width": widths[-1],
        "blocks": tuple(config.get("depths", (3, 4, 6, 3))),
        "block": config.get("layer_type", "bottleneck"),
        "stem_width": config.get("embedding_size", 64),
        "stride_first": config.get("downsample_in_bottleneck", False),
    }
    stream = {"modality": "image", "encoder": encoder, "reader": reader}
    heads: dict[str, Any] = {}
    if _CLASSIFIER in configs.classes:
        heads["class"] = {"use": "class", "stream": "image", "classes": class_names(config)}
    return {"streams": {"image": stream}, "backbone": "none", "heads": heads}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``ResNetModel``, below ``resnet.`` in the class that wraps it."""
    ours = "streams.image.encoder."
    block, layer = ours + "stages.{i}.{j}.", "encoder.stages.{i}.layers.{j}."
    table = NameTable(
        [
            *_conv_norm(ours + "stem", "embedder.embedder"),
            *_conv_norm(block + "shortcut", layer + "shortcut"),
            *(rule for k in range(3) for rule in _conv_norm(f"{block}layers.{k}", f"{layer}layer.{k}")),
        ]
    )
    is_wrapped = bool(model.heads) or any(name.startswith("resnet.") for name in stored)
    table = table.below("resnet.") if is_wrapped else table
    return table + NameTable([Rule("heads.class.{p}", "classifier.1.{p}")])


def _conv_norm(ours: str, hub: str) -> list[Rule]:
    return [Rule(ours + ".conv.{p}", hub + ".convolution.{p}"), Rule(ours + ".norm.{p}", hub + ".normalization.{p}")]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json``."""
    encoder = model.streams["image"].encoder if list(model.streams) == ["image"] else None
    heads = list(model.heads.values())
    if not isinstance(encoder, ResnetConfig) or any(head.use != "class" for head in heads):
        raise ConfigError(
            "resnet: found a model of other parts, expected one image stream with the encoder 'resnet', and no head "
            "but 'class'"
        )
    config = {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "embedding_size": encoder.stem_width,
        "hidden_sizes": list(encoder.widths),
        "depths": list(encoder.blocks),
        "layer_type": encoder.block,
        "hidden_act": "relu",
        "downsample_in_bottleneck": encoder.stride_first,
    }
    if heads:
        config |= {"architectures": [_CLASSIFIER], **label_config(getattr(heads[0], "classes", ()))}
    processor = image_preprocessor(model.streams["image"].reader, "ConvNextImageProcessor")
    return {"config.json": config, "preprocessor_config.json": processor}


_PREPROCESSOR = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875}
_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}


def _size(parameters: int, config: Mapping[str, Any]) -> Size:
    shared = {"model_type": "resnet", "architectures": [_CLASSIFIER], "num_labels": 1000}
    return Size({**shared, **config}, parameters, _PREPROCESSOR)


RESNET = Architecture(
    "resnet",
    ("resnet",),
    "ResNet, arXiv 1512.03385, section 4.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "resnet-18": _size(11_689_512, {**_BASIC, "depths": [2, 2, 2, 2]}),
        "resnet-34": _size(21_797_672, {**_BASIC, "depths": [3, 4, 6, 3]}),
        "resnet-50": _size(25_557_032, {}),
        "resnet-101": _size(44_549_160, {"depths": [3, 4, 23, 3]}),
        "resnet-152": _size(60_192_808, {"depths": [3, 8, 36, 3]}),
    },
)
"""See the module."""
