"""The video reader: a video -> chosen frames ``[L, 3, S, S]``."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from polymodal.core.batch import ModelInput
from polymodal.core.limits import Limits
from polymodal.core.parts import Part, Video
from polymodal.modalities.decoding import expect_part
from polymodal.modalities.image import Fit, checked_std, fit_to_canvas
from polymodal.modalities.reader import Reader, ReaderConfig
from polymodal.modalities.video.decode import iter_frames, spread_indices
from polymodal.modalities.video.header import VideoHeader, probe_video

Triple = tuple[float, float, float]


class VideoReaderConfig(ReaderConfig):
    """How videos become model input.

    Args:
        size_px: side of a frame.
        sampling: ``uniform``: ``num_frames`` of any video. ``fps``: ``sample_fps`` for every second of it, at most
            ``max_frames``. Either way they are spread evenly over the whole video, and a video that has fewer gives all
            it has, none twice.
        num_frames: frames of ``uniform``.
        sample_fps: frames per second of ``fps``.
        max_frames: upper bound of ``fps``.
        resize: how a frame meets the square where its proportions differ.
        mean: per channel, of pixels in 0..1, subtracted.
        std: per channel, divided by.

    The sound of a video is another part: ``Audio(path_of_the_video)``.
    """

    modality: ClassVar[str] = "video"

    use: Literal["video"] = "video"
    size_px: int = Field(224, ge=1, le=4096)
    sampling: Literal["uniform", "fps"] = "uniform"
    num_frames: int = Field(8, ge=1, le=4096)
    sample_fps: float = Field(1.0, gt=0, le=1000)
    max_frames: int = Field(64, ge=1, le=4096)
    resize: Fit = "stretch"
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    _positive_std = field_validator("std")(checked_std)

    def indices(self, header: VideoHeader) -> tuple[int, ...]:
        """The frames that are read of a video with this header, ascending."""
        wanted = self.num_frames
        if self.sampling == "fps":
            wanted = min(self.max_frames, max(1, round(header.duration_s * self.sample_fps)))
        return spread_indices(header.num_frames, wanted)


class VideoReader(Reader):
    """Reads videos; one unit, its length counted in frames."""

    modality = "video"
    is_ragged = True
    config: VideoReaderConfig

    def __init__(self, config: VideoReaderConfig, limits: Limits) -> None:
        super().__init__(config, limits)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, size_px, size_px)``."""
        return (3, self.config.size_px, self.config.size_px)

    def measure(self, part: Part) -> tuple[int, ...]:
        """The number of frames that will be read, from the header."""
        return (len(self.config.indices(probe_video(expect_part(part, Video), self.limits))),)

    def read(self, part: Part) -> ModelInput:
        """Decode the chosen frames, fit and normalise: float32 ``[L, 3, size_px, size_px]``."""
        part = expect_part(part, Video)
        header = probe_video(part, self.limits)
        indices = self.config.indices(header)
        unit = np.empty((len(indices), *self.unit_shape), np.float32)
        canvas = (self.config.size_px, self.config.size_px)
        for place, frame in enumerate(iter_frames(part, self.limits, header, indices)):
            unit[place] = fit_to_canvas(frame.pixels, canvas, self.config.resize, self.config.mean, self.config.std)
        return ModelInput([unit], (len(indices),), size_px=(header.width_px, header.height_px))
