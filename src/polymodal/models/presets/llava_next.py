"""LLaVA-NeXT (1.6) checkpoints (``model_type: llava_next``): LLaVA with pictures in tiles."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.arrangements import TileRowsConfig
from polymodal.models.presets import llava
from polymodal.models.presets.anyres_reader import anyres_preprocessor, anyres_reader, pinpoints_of
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.llama import LLAMA, MISTRAL
from polymodal.models.weights import HubConfigs, NameTable, Rule

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream in tiles, with a learned token ending each row, among the text of a decoder."""

    def stream(size_px: int, kind: str) -> dict[str, Any]:
        reader = anyres_reader(configs.preprocessor, configs.config, _PINPOINTS, size_px, kind)
        return {"reader": reader, "arrange": {"use": "tile_rows"}}

    return llava.model_of(configs, stream)


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``LlavaNextForConditionalGeneration``: LLaVA's and the end of a row."""
    return llava.names(model, stored) + NameTable([Rule("streams.image.arrangement.newline", "image_newline")])


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, ``preprocessor_config.json``, ``processor_config.json`` and ``generation_config.json``."""
    image = model.streams.get("image")
    if len(model.streams) != 1 or image is None or image.arrange != TileRowsConfig():
        raise ConfigError(
            f"llava_next: found the streams {sorted(model.streams)}, expected an image stream with arrange: tile_rows"
        )
    preprocessor = anyres_preprocessor(image.reader, llava.processor_kind(model), "LlavaNextImageProcessor")
    config, special, processor = llava.hub_config(model, vocabulary, "llava_next")
    return {
        "config.json": {**config, "image_grid_pinpoints": pinpoints_of(image.reader)},
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {"processor_class": "LlavaNextProcessor", **processor},
        "generation_config.json": special,
    }


def _size(parameters: int, text: dict[str, Any]) -> Size:
    config = {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "vision_config": llava.VISION,
        "text_config": text,
    }
    return Size(config, parameters, unused=llava.LAST_BLOCK)


_MISTRAL = {**MISTRAL.sizes["mistral-7b-v0.1"].config, "vocab_size": 32064, "sliding_window": None}
_VICUNA = {"model_type": "llama", "vocab_size": 32064}

LLAVA_NEXT = Architecture(
    "llava_next",
    ("llava_next",),
    "LLaVA-NeXT (Liu et al. 2024); LLaVA-1.5, arXiv 2310.03744, section 3.4 (tiles)",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "llava-v1.6-mistral-7b": _size(7_566_747_648, {**_MISTRAL, "rope_theta": 1_000_000.0}),
        "llava-v1.6-vicuna-7b": _size(7_063_431_168, {**LLAMA.sizes["vicuna-7b-v1.5"].config, **_VICUNA}),
        "llava-v1.6-vicuna-13b": _size(13_351_499_776, {**LLAMA.sizes["vicuna-13b-v1.5"].config, **_VICUNA}),
    },
)
"""See the module."""
