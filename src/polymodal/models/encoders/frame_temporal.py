"""A vision transformer on each frame, then attention over time.

Legend: ``U`` videos, ``L`` frames, ``F`` valid frames, ``P`` patches of a frame, ``N`` features, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, Features, finish
from polymodal.models.encoders.vit import VitFields, VitTrunk
from polymodal.models.layers import Layout, Transformer, sinusoidal
from polymodal.models.layers.convolution import valid_mask


class FrameTemporalConfig(VitFields):
    """Frames are seen one by one, then related over time.

    Source: the factorised encoder of ViViT, arXiv 2103.15691, section 3.3 (model 2), with features for every frame, or
    for every patch of every frame (then each place of the image attends along time).
    """

    use: Literal["frame_temporal"] = "frame_temporal"
    modality: ClassVar[str] = "video"
    features: Literal["frame", "patch"] = "frame"
    """One feature for each frame (its pooled vector), or one for each of its patches; frames come in order."""
    temporal_depth: int = Field(default=2, ge=1)
    """Blocks of the transformer over time."""
    num_frames: int = Field(default=8, ge=1)
    """Frames that the default reader takes; the encoder itself takes any number."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``: one frame."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """Frames, or frames x patches."""
        return length * (1 if self.features == "frame" else self.grid**2)

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_frames, size_px=self.image_size)

    def build(self) -> FrameTemporal:
        """The module."""
        return FrameTemporal(self)


class FrameTemporal(Encoder):
    """See :class:`FrameTemporalConfig`."""

    config: FrameTemporalConfig

    def __init__(self, config: FrameTemporalConfig) -> None:
        super().__init__()
        self.config = config
        self.frame = VitTrunk(config)
        self.temporal = Transformer(config.stack(config.temporal_depth))

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, 3, S, S]``; padding frames are never computed."""
        self.require_shape(values)
        num_units, length = values.shape[:2]
        is_valid_UL = valid_mask(lengths_U, length)
        patches_FPD, pooled_FD = self.frame(values[is_valid_UL])
        x_FPD = patches_FPD if self.config.features == "patch" else pooled_FD[:, None]
        places, width = x_FPD.shape[1:]
        x_ULPD = x_FPD.new_zeros(num_units, length, places, width)
        x_ULPD[is_valid_UL] = x_FPD
        x_ULPD = x_ULPD + sinusoidal(length, width, device=x_FPD.device).to(x_FPD)[:, None]
        # Each place of the image is a sequence over time.
        along_time = x_ULPD.transpose(1, 2).flatten(0, 1)
        layout = Layout.padded(is_valid_UL.repeat_interleave(places, dim=0), causal=False)
        x_UPLD = self.temporal(along_time, layout).view(num_units, places, length, width)
        is_valid_UN = is_valid_UL.repeat_interleave(places, dim=1)
        # A class token of the frames reaches the features only through attention: every parameter still learns.
        return finish(torch.transpose(x_UPLD, 1, 2).flatten(1, 2), is_valid_UN)
