"""Preprocessing of published video checkpoints as our video reader, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.reader import ReaderConfig
from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.presets.architecture import require

_RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""The numbers by which the stored files name a filter (those of Pillow)."""


def video_reader(preprocessor: Mapping[str, Any], size_px: int, num_frames: int, where: str) -> dict[str, Any]:
    """The reader of a frame processor's config: shorter edge and centre crop, or stretching; then mean and deviation.

    Frames are spread over the whole video; which ones a checkpoint was trained on stands in no file.

    Args:
        preprocessor: ``preprocessor_config.json``; {} takes the frame processors' defaults.
        size_px: side of the model's frames.
        num_frames: frames of the model.
        where: the architecture, for messages.

    Raises:
        ConfigError: if the config asks for what the reader does not do.
    """
    require(preprocessor, where, do_resize=True, do_rescale=True)
    size = preprocessor.get("size", {"shortest_edge": size_px})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = preprocessor.get("crop_size", size_px)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    reader: dict[str, Any] = {
        "use": "video",
        "size_px": size_px,
        "num_frames": num_frames,
        "resample": _RESAMPLES[preprocessor.get("resample", 2)],
        "rescale": preprocessor.get("rescale_factor", 1 / 255),
    }
    is_cropped = preprocessor.get("do_center_crop", True)
    if "shortest_edge" in size and is_cropped and crop == {"height": size_px, "width": size_px}:
        reader |= {"resize": "crop", "shortest_edge_px": size["shortest_edge"]}
    elif size == {"height": size_px, "width": size_px} and (not is_cropped or crop == size):
        reader["resize"] = "stretch"
    else:
        raise ConfigError(
            f"{where}: found frames of size {dict(size)}, crop {dict(crop) if is_cropped else None}; expected the "
            f"shorter edge and a crop to {size_px} pixels, or {size_px} x {size_px}"
        )
    is_normalised = preprocessor.get("do_normalize", True)
    reader["mean"] = tuple(preprocessor.get("image_mean", (0.5,) * 3)) if is_normalised else (0.0,) * 3
    reader["std"] = tuple(preprocessor.get("image_std", (0.5,) * 3)) if is_normalised else (1.0,) * 3
    return reader


def frame_processor(reader: ReaderConfig | None) -> dict[str, Any]:
    """``preprocessor_config.json`` of a reader: the inverse of :func:`video_reader`.

    Frames of all these checkpoints go through VideoMAE's processor.

    Raises:
        ConfigError: if the published format cannot say what the reader does.
    """
    assert isinstance(reader, VideoReaderConfig)
    if reader.resize not in ("crop", "stretch"):
        raise ConfigError(
            f"frame processor: found resize: {reader.resize}, the published format knows crop and stretch"
        )
    square = {"height": reader.size_px, "width": reader.size_px}
    is_cropped = reader.resize == "crop"
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": reader.shortest_edge_px or reader.size_px} if is_cropped else square,
        "do_center_crop": is_cropped,
        "crop_size": square,
        "resample": next(number for number, name in _RESAMPLES.items() if name == reader.resample),
        "do_rescale": True,
        "rescale_factor": reader.rescale,
        "do_normalize": True,
        "image_mean": list(reader.mean),
        "image_std": list(reader.std),
    }
