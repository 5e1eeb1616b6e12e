"""LLaVA-OneVision checkpoints (``model_type: llava_onevision``): one picture in tiles, several pictures, or videos."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.connectors.arrangements import PooledFramesConfig, TileRowsConfig
from polymodal.models.encoders.vit_frames import VitFramesConfig
from polymodal.models.presets import llava
from polymodal.models.presets.anyres_reader import anyres_preprocessor, anyres_reader, pinpoints_of
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.language import read_json
from polymodal.models.presets.qwen import QWEN2
from polymodal.models.presets.video_reader import frame_processor, video_reader
from polymodal.models.weights import HubConfigs, NameTable, Rule

_TILE = 384
_PINPOINTS = [[_TILE * rows, _TILE * cols] for rows in range(1, 7) for cols in range(1, 7)]
_NUM_FRAMES = 32
"""Frames of a video, which stand in no file: arXiv 2408.03326, section 3.2."""
_VIDEO_TOKEN = "<video>"


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Streams of pictures and of videos, which share a tower, a connector and the learned token, and a decoder."""
    max_tiles = _max_tiles(configs.config.get("vision_aspect_ratio", "anyres_max_9"))

    def image(size_px: int, kind: str) -> dict[str, Any]:
        reader = anyres_reader(configs.preprocessor, configs.config, _PINPOINTS, size_px, kind)
        return {"reader": {**reader, "cut": "single"}, "arrange": {"use": "tile_rows", "max_tiles": max_tiles}}

    data = llava.model_of(configs, image)
    encoder = data["streams"]["image"]["encoder"]
    data["streams"]["video"] = {
        "modality": "video",
        "encoder": {**encoder, "use": "vit_frames"},
        "reader": _video_reader(configs, encoder["image_size"]),
        "connector": data["streams"]["image"]["connector"],
        "arrange": {"use": "pooled_frames"},
        "enters": "sequence",
        "shares": "image",
        "shares_tokens": True,
    }
    chat = data["backbone"]["chat"]
    if not isinstance(chat, str):
        video_token = configs.processor.get("video_token") or configs.tokenizer.get("video_token") or _VIDEO_TOKEN
        data["backbone"]["chat"] = {**chat, "marks": {**chat["marks"], "video": video_token}}
    return data


def _max_tiles(ratio: str) -> int:
    found = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if found is None:
        raise ConfigError(f"vision_aspect_ratio: found {ratio!r}, expected anyres_max_ and a number of tiles")
    return int(found[1])


def _video_reader(configs: HubConfigs, size_px: int) -> dict[str, Any]:
    """Of ``video_preprocessor_config.json``, or of what ``processor_config.json`` holds in its place."""
    found: Mapping[str, Any] = configs.processor.get("video_processor") or read_json(
        configs.folder, "video_preprocessor_config.json"
    )
    given = {key: value for key, value in found.items() if value is not None}
    side = {"height": size_px, "width": size_px}
    given = {"size": side, "do_center_crop": False, "resample": 3, **given}
    return video_reader(given, size_px, given.get("num_frames", _NUM_FRAMES), "llava_onevision")


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``LlavaOnevisionForConditionalGeneration``: LLaVA's and the token that ends rows and videos."""
    return llava.names(model, stored) + NameTable([Rule("streams.image.arrangement.newline", "image_newline")])


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``, the three configs of preprocessing, and ``generation_config.json``."""
    image, video = model.streams.get("image"), model.streams.get("video")
    if len(model.streams) != 2 or image is None or video is None or not video.shares_tokens:
        raise ConfigError(
            f"llava_onevision: found the streams {sorted(model.streams)}, expected image and video, which share all"
        )
    rows = image.arrange
    frames: Any = video.reader
    is_known = video.arrange == PooledFramesConfig() and isinstance(frames, VideoReaderConfig)
    if not is_known or not isinstance(rows, TileRowsConfig) or not isinstance(video.encoder, VitFramesConfig):
        raise ConfigError(
            "llava_onevision: found other arrangements, expected tile_rows with max_tiles and pooled_frames"
        )
    if rows.max_tiles is None:
        raise ConfigError("llava_onevision: found tile_rows without max_tiles, expected the number of tiles")
    # Of one picture alone; several are what this processor always fills up to squares.
    kind = llava.processor_kind(model)
    preprocessor = anyres_preprocessor(image.reader, kind, "LlavaOnevisionImageProcessor")
    videos = {**frame_processor(frames), "video_processor_type": "LlavaOnevisionVideoProcessor"}
    del videos["image_processor_type"]
    if not videos["do_center_crop"]:
        del videos["crop_size"]
    videos |= {"num_frames": frames.num_frames, "do_sample_frames": False, "return_metadata": False}
    config, special, processor = llava.hub_config(model, vocabulary, "llava_onevision")
    video_token = getattr(model.backbone.chat, "marks", {}).get("video", _VIDEO_TOKEN)
    ratio = f"anyres_max_{rows.max_tiles}"
    return {
        "config.json": {
            **config,
            "image_grid_pinpoints": pinpoints_of(image.reader),
            "vision_aspect_ratio": ratio,
            "video_token_index": vocabulary.controls.get(video_token, 0),
        },
        "preprocessor_config.json": preprocessor,
        "video_preprocessor_config.json": videos,
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            **processor,
            "num_image_tokens": image.encoder.num_features(1),
            "video_token": video_token,
            "vision_aspect_ratio": ratio,
            "video_processor": videos,
        },
        "generation_config.json": special,
    }


_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": _TILE,
    "patch_size": 14,
    "vision_use_head": False,
}


def _size(parameters: int, language: str, **more: Any) -> Size:
    text = {**QWEN2.sizes[language].config, "model_type": "qwen2", **more}
    config = {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": _VISION,
        "text_config": text,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
    }
    return Size(config, parameters)


LLAVA_ONEVISION = Architecture(
    "llava_onevision",
    ("llava_onevision",),
    "LLaVA-OneVision, arXiv 2408.03326, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "llava-onevision-qwen2-0.5b-ov": _size(893_675_552, "qwen2-0.5b", vocab_size=152000),
        "llava-onevision-qwen2-7b-ov": _size(8_030_807_584, "qwen2-7b", vocab_size=152128),
    },
)
"""See the module."""
