"""Parts of a recipe that the ``transformers`` library computes: ``{use: transformers, from: FOLDER, ...}`` filled in.

The config comes from the folder's ``config.json``, the reader from its preprocessing files, the tokenizer from its
tokenizer files; what the recipe says itself is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.table import BACKBONES
from polymodal.models.encoders.table import ENCODERS
from polymodal.models.encoders.transformers_tower import part_config
from polymodal.models.presets.image_reader import DEFAULTS, image_reader
from polymodal.models.presets.language import chat_of, tokenizer_of
from polymodal.models.presets.video_reader import video_reader
from polymodal.models.presets.wav2vec2 import wave_reader
from polymodal.models.transformers_library import read_config
from polymodal.models.weights import HubFolder

_KNOWN_STEPS = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("image_processor_type", "feature_extractor_type", "processor_class"),
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "device", "return_tensors"),
}
"""Keys of an image processor that the reader understands, or that change nothing."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_adapted(value: Mapping[str, Any]) -> bool:
    """Whether a part is the library's."""
    return value.get("use") == "transformers"


def adapt(value: dict[str, Any], role: str, holder: dict[str, Any], key: str, folder: Path) -> None:
    """Fill in a part in its place, ``holder[key]``, from a checkpoint folder.

    Args:
        value: what the recipe says of the part, without ``from``.
        role: ``encoder`` or ``backbone``.
        holder: the stream, or the model.
        key: where the part stands in it.
        folder: the checkpoint.

    Raises:
        ConfigError: if the role has no adapter, the modality is not said, or the preprocessing has no reader.
        CheckpointError: if the folder has no readable config.
    """
    if role == "backbone":
        _adapt_backbone(value, holder, key, folder)
    elif role == "encoder":
        _adapt_encoder(value, holder, key, folder)
    else:
        raise ConfigError(f"{key}: found use: transformers, which is for encoders and backbones")


def _adapt_backbone(value: dict[str, Any], model: dict[str, Any], key: str, folder: Path) -> None:
    configs = HubFolder(folder).configs
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    given = {**value, "config": read_config(folder)}
    if has_tokenizer:
        given = {"chat": chat_of(configs), **given}
    config: Any = BACKBONES.parse(given, "backbone")
    model[key] = config.to_data()
    if has_tokenizer:
        model.setdefault("tokenizer", tokenizer_of(configs, config.rows))


def _adapt_encoder(value: dict[str, Any], stream: dict[str, Any], key: str, folder: Path) -> None:
    modality = value.get("modality") or stream.get("modality")
    if modality is None:
        raise ConfigError("encoder use: transformers: say modality, the encoder's or the stream's")
    config = part_config(read_config(folder), modality)
    reader = stream.get("reader") or _reader(HubFolder(folder).configs.preprocessor, modality, config, folder)
    value = {**value, "modality": modality, "config": config}
    if "size_px" not in value and reader is not None and "size_px" in reader:
        value["size_px"] = reader["size_px"]
    encoder: Any = ENCODERS.parse(value, "encoder")
    stream[key] = encoder.to_data()
    stream.setdefault("modality", modality)
    if reader is not None:
        frames = {"num_frames": encoder.facts.length} if modality == "video" and encoder.facts.length else {}
        stream.setdefault("reader", {**frames, **reader})


def _reader(
    preprocessor: Mapping[str, Any], modality: str, config: Mapping[str, Any], folder: Path
) -> dict[str, Any] | None:
    """The reader of a checkpoint's preprocessing; None: the encoder's default, where there is nothing to know.

    Raises:
        ConfigError: if there is no reader that does the same.
    """
    if modality == "sensor":
        return None
    if modality == "text":
        has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
        return {"use": "text", "tokenizer": str(folder)} if has_tokenizer else None
    if not preprocessor:
        raise ConfigError(
            f"{folder}: holds no preprocessor_config.json, so that nothing says how {modality} is prepared; write the "
            "stream's reader"
        )
    try:
        if modality == "image":
            return _image(preprocessor, config)
        if modality == "video":
            return _video(preprocessor, config)
        return _audio(preprocessor)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}. Or write the stream's reader yourself") from None


def _image(preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(preprocessor.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    if name == "Siglip2ImageProcessor":
        # Pictures of any shape become square ones of as many patches; only square pictures are then seen as there.
        side = preprocessor.get("patch_size", 16) * math.isqrt(preprocessor.get("max_num_patches", 256))
        fixed = {
            **preprocessor,
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": side, "width": side},
        }
        return image_reader({"resample": 2, **fixed}, side, "SiglipImageProcessor")
    if name not in DEFAULTS:
        asked = [key for key in sorted(set(preprocessor) - _KNOWN_STEPS) if preprocessor[key]]
        missing = [key for key in ("size", "resample", "image_mean", "image_std") if key not in preprocessor]
        if asked or missing:
            what = f"asks for {asked[0]}: {preprocessor[asked[0]]!r}" if asked else f"does not say {missing[0]}"
            raise ConfigError(f"preprocessor_config.json: {name or 'its processor'} {what}, which has no reader")
        kind = "CLIPImageProcessor" if preprocessor.get("do_center_crop") else "ViTImageProcessor"
        preprocessor = {"do_center_crop": False, **preprocessor, "image_processor_type": kind}
    return image_reader(preprocessor, int(config.get("image_size") or 224), "ViTImageProcessor")


def _video(preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    size = config.get("image_size") or config.get("crop_size") or 224
    reader = video_reader(preprocessor, int(size), 1, "preprocessor_config.json")
    del reader["num_frames"]
    if preprocessor.get("offset"):
        # ViViT moves rescaled pixels down by one before mean and deviation.
        reader["mean"] = tuple(mean + 1.0 for mean in reader["mean"])
    return reader


def _audio(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    name = preprocessor.get("feature_extractor_type")
    if name == "Wav2Vec2FeatureExtractor":
        return wave_reader(preprocessor)
    if name == "WhisperFeatureExtractor":
        rate = preprocessor.get("sampling_rate", 16_000)
        return {
            "use": "audio",
            "rate_hz": rate,
            "num_mels": preprocessor.get("feature_size", 80),
            "window_s": preprocessor.get("n_fft", 400) / rate,
            "hop_s": preprocessor.get("hop_length", 160) / rate,
            "clip_s": preprocessor.get("chunk_length", 30),
            "pad_clip": True,
        }
    raise ConfigError(
        f"preprocessor_config.json: found {name!r}, expected Wav2Vec2FeatureExtractor or WhisperFeatureExtractor: no "
        "reader does what others do"
    )
