"""A vision transformer on each frame, nothing over time.

Legend: ``U`` videos, ``L`` frames, ``F`` valid frames, ``P`` patches of a frame, ``N = L * P`` features, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, Features, finish
from polymodal.models.encoders.vit import VitFields, VitTrunk
from polymodal.models.layers.convolution import valid_mask


class VitFramesConfig(VitFields):
    """Every patch of every frame is a feature, frame by frame; what relates the frames is the backbone.

    Its trunk may be an image encoder's (``shares``), so that a model of pictures reads videos as well.

    Source: LLaVA-OneVision, arXiv 2408.03326, section 3.2 (frames are pictures).
    """

    use: Literal["vit_frames"] = "vit_frames"
    modality: ClassVar[str] = "video"
    num_frames: int = Field(default=8, ge=1)
    """Frames that the default reader takes; the encoder itself takes any number."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``: one frame."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """Frames x patches."""
        return length * self.grid**2

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_frames, size_px=self.image_size)

    def build(self) -> VitFrames:
        """The module."""
        return VitFrames(self)


class VitFrames(Encoder):
    """See :class:`VitFramesConfig`."""

    config: VitFramesConfig

    def __init__(self, config: VitFramesConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = VitTrunk(config)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, 3, S, S]``; padding frames are never computed."""
        self.require_shape(values)
        is_valid_UL = valid_mask(lengths_U, values.shape[1])
        patches_FPD, _ = self.trunk(values[is_valid_UL])
        places, width = patches_FPD.shape[1:]
        x_ULPD = patches_FPD.new_zeros(*is_valid_UL.shape, places, width)
        x_ULPD[is_valid_UL] = patches_FPD
        return finish(x_ULPD.flatten(1, 2), is_valid_UL.repeat_interleave(places, dim=1))
