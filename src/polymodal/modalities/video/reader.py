"""The video reader: a video -> chosen frames ``[L, 3, S, S]``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from polymodal.core.batch import ModelInput
from polymodal.core.limits import Limits
from polymodal.core.parts import Part, Video
from polymodal.modalities.decoding import expect_part
from polymodal.modalities.image import Fill, Fit, Resample, checked_std, fit_to_canvas
from polymodal.modalities.reader import Reader, ReaderConfig
from polymodal.modalities.video.decode import Place, clip_indices, iter_frames, spread_indices
from polymodal.modalities.video.header import VideoHeader, probe_video

Triple = tuple[float, float, float]


_CANDIDATES = 4
"""Frames that are looked at for each one that ``change`` takes."""


class VideoReaderConfig(ReaderConfig):
    """How videos become model input.

    Args:
        size_px: side of a frame.
        sampling: ``uniform``: ``num_frames`` of any video. ``fps``: ``sample_fps`` for every second of it, at most
            ``max_frames``. Either way they are spread evenly over the whole video. ``clip``: ``num_frames``, each
            ``frame_stride`` after the last, from the middle of the video (16 x 4 of the Kinetics recipes). ``change``:
            of four times ``num_frames`` spread ones, the first and those that differ most from the one before; four
            times as many are decoded. A video that has fewer frames gives all it has, none twice.
        num_frames: frames of ``uniform``, ``clip`` and ``change``.
        sample_fps: frames per second of ``fps``.
        max_frames: upper bound of ``fps``.
        place: which frame stands for its span of a video that frames are spread over: the ``middle`` one, the first
            (``start``), or so that the first and the last of the video are taken (``ends``).
        frame_stride: distance of the frames of ``clip``; smaller where the video is too short for it.
        resize: how a frame meets the square where its proportions differ.
        resample: how pixels are interpolated.
        shortest_edge_px: with ``resize: crop``, the shorter side of the scaled frame that the square is cut from; None:
            the least that covers it.
        fill: what ``pad`` and ``pad_square`` fill the rest with.
        rescale: factor of a pixel, before mean and deviation.
        mean: per channel, of rescaled pixels, subtracted.
        std: per channel, divided by.

    The sound of a video is another part: ``Audio(path_of_the_video)``.
    """

    modality: ClassVar[str] = "video"

    use: Literal["video"] = "video"
    size_px: int = Field(224, ge=1, le=4096)
    sampling: Literal["uniform", "fps", "clip", "change"] = "uniform"
    num_frames: int = Field(8, ge=1, le=4096)
    sample_fps: float = Field(1.0, gt=0, le=1000)
    max_frames: int = Field(64, ge=1, le=4096)
    place: Place = "middle"
    frame_stride: int = Field(4, ge=1, le=4096)
    resize: Fit = "stretch"
    resample: Resample = "bicubic"
    shortest_edge_px: int | None = Field(None, ge=1, le=8192)
    fill: Fill = "mean"
    rescale: float = Field(1 / 255, gt=0)
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    _positive_std = field_validator("std")(checked_std)

    @model_validator(mode="after")
    def _edge_covers(self) -> Self:
        edge = self.shortest_edge_px
        if edge is not None and (self.resize != "crop" or edge < self.size_px):
            raise ValueError(
                f"shortest_edge_px {edge} belongs to resize: crop and is at least size_px {self.size_px}; found "
                f"resize: {self.resize}"
            )
        return self

    def indices(self, header: VideoHeader) -> tuple[int, ...]:
        """The frames that are read of a video with this header, ascending."""
        if self.sampling == "clip":
            return clip_indices(header.num_frames, self.num_frames, self.frame_stride)
        wanted = self.num_frames if self.sampling != "change" else _CANDIDATES * self.num_frames
        if self.sampling == "fps":
            wanted = min(self.max_frames, max(1, round(header.duration_s * self.sample_fps)))
        return spread_indices(header.num_frames, wanted, self.place)


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
        found = len(self.config.indices(probe_video(expect_part(part, Video), self.limits)))
        return (min(found, self.config.num_frames) if self.config.sampling == "change" else found,)

    def read(self, part: Part) -> ModelInput:
        """Decode the chosen frames, fit and normalise: float32 ``[L, 3, size_px, size_px]``."""
        part = expect_part(part, Video)
        header = probe_video(part, self.limits)
        indices = self.config.indices(header)
        unit = np.empty((len(indices), *self.unit_shape), np.float32)
        canvas = (self.config.size_px, self.config.size_px)
        for place, frame in enumerate(iter_frames(part, self.limits, header, indices)):
            unit[place] = fit_to_canvas(
                frame.pixels,
                canvas,
                self.config.resize,
                self.config.mean,
                self.config.std,
                resample=self.config.resample,
                shortest_edge_px=self.config.shortest_edge_px,
                fill=self.config.fill,
                rescale=self.config.rescale,
            )
        if self.config.sampling == "change":
            unit = unit[most_changed(unit, self.config.num_frames)]
        return ModelInput([unit], (len(unit),), size_px=(header.width_px, header.height_px))


def most_changed(frames_L3HW: NDArray[np.float32], wanted: int) -> NDArray[np.int64]:
    """The places, ascending, of the first frame and of the ``wanted - 1`` that differ most from the one before.

    Worked example: frames ``[a a a b b c]`` and 3 wanted give ``[0 3 5]``.

    Args:
        frames_L3HW: float32 frames in order.
        wanted: how many to take, at least 1; fewer where there are fewer.
    """
    change_L = np.abs(np.diff(frames_L3HW, axis=0)).mean(axis=(1, 2, 3))
    best = np.argsort(-change_L, kind="stable")[: wanted - 1] + 1
    places: NDArray[np.int64] = np.sort(np.append(best, 0)).astype(np.int64)
    return places
