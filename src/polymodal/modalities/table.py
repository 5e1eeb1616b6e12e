"""Every reader by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polymodal.core.config import Table
from polymodal.core.limits import Limits
from polymodal.modalities.audio import AudioReader, AudioReaderConfig
from polymodal.modalities.image import ImageReader, ImageReaderConfig
from polymodal.modalities.image.patches import PatchesReader, PatchesReaderConfig
from polymodal.modalities.points import PointsReader, PointsReaderConfig
from polymodal.modalities.reader import Reader, ReaderConfig
from polymodal.modalities.sensor import SensorReader, SensorReaderConfig
from polymodal.modalities.text import TextReader, TextReaderConfig, Tokenizer
from polymodal.modalities.video import VideoReader, VideoReaderConfig

_MEDIA_READERS: dict[str, Callable[[Any, Limits], Reader]] = {
    "image": ImageReader,
    "audio": AudioReader,
    "video": VideoReader,
    "points": PointsReader,
    "sensor": SensorReader,
}

READERS: Table[ReaderConfig] = Table(
    "reader",
    [
        TextReaderConfig,
        ImageReaderConfig,
        PatchesReaderConfig,
        AudioReaderConfig,
        VideoReaderConfig,
        PointsReaderConfig,
        SensorReaderConfig,
    ],
)
"""Every reader config by name."""


def build_reader(config: ReaderConfig, limits: Limits, tokenizer: Tokenizer) -> Reader:
    """The reader of a config; the tokenizer is for text readers."""
    if isinstance(config, TextReaderConfig):
        return TextReader(config, limits, tokenizer)
    if isinstance(config, PatchesReaderConfig):
        return PatchesReader(config, limits)
    return _MEDIA_READERS[config.modality](config, limits)
