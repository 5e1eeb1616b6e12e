"""An inception network inflated along time: I3D.

Legend: ``U`` videos, ``L`` frames, ``C`` channels, ``H`` and ``W`` of a grid, ``K`` taps of a kernel, ``T`` steps,
``N = T H W`` features, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import CheckpointError
from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, finish
from polymodal.models.layers.convolution import shortened, valid_mask

_PUBLISHED_WIDTH = 1024
_MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of each inception module's branches at the published width: 1; 1 then 3; 1 then 3; pool then 1."""
_POOLS = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}
"""Kernel and stride of the pooling in front of a module."""
_TIME_STRIDE, _SPACE_STRIDE = 8, 32


class I3dConfig(EncoderConfig):
    """Two-stream I3D's network: Inception-v1 whose kernels and pools have grown along time.

    Source: arXiv 1705.07750, section 2.4 and figure 3; channels and strides of the published code. Its even sizes are
    padded as there; an odd number of frames is completed by what ``time_padding`` says.
    """

    use: Literal["i3d"] = "i3d"
    modality: ClassVar[str] = "video"
    width: int = Field(default=128, ge=8)
    """Channels of the last module, 1024 as published; all others follow in proportion. A multiple of 8."""
    image_size: int = Field(default=64, ge=1)
    """Side of a square frame in pixels."""
    num_frames: int = Field(default=16, ge=1)
    """Frames that the default reader takes; the encoder itself takes any number."""
    kernels: Literal["3d", "2d"] = "3d"
    """Kernels that read neighbouring frames, or the network on single frames that they are inflated from."""
    time_padding: Literal["zeros", "edge"] = "zeros"
    """What stands before the first and after the last frame: zeros as published, or the frame itself, with which an
    inflated network sees in a still video exactly what the 2-D one sees in the picture."""
    norm_gain: bool = False
    """Whether the batch norms have a gain; the published ones have a shift alone."""

    @model_validator(mode="after")
    def _width_parts(self) -> Self:
        if self.width % 8:
            raise ValueError(f"found width {self.width}, expected a multiple of 8")
        return self

    @property
    def grid(self) -> int:
        """Places along one side of the last grid."""
        return shortened(self.image_size, _SPACE_STRIDE)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``: one frame."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """``ceil(length / 8)`` steps of ``grid ** 2`` places."""
        return shortened(length, _TIME_STRIDE) * self.grid**2

    def channels(self, published: int) -> int:
        """Channels at this width of what has ``published`` ones at 1024."""
        return max(1, round(published * self.width / _PUBLISHED_WIDTH))

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_frames, size_px=self.image_size)

    def build(self) -> I3d:
        """The module."""
        return I3d(self)


class Clip:
    """Frames on their way through the network.

    Args:
        x_UCLHW: values; anything beyond a video's own frames.
        lengths_U: frames of each video.
        padding: what stands outside a video.
    """

    def __init__(self, x_UCLHW: Tensor, lengths_U: Tensor, padding: Literal["zeros", "edge"]) -> None:
        self.x_UCLHW, self.lengths_U, self.padding = x_UCLHW, lengths_U, padding
        self.is_even = bool((lengths_U == x_UCLHW.shape[2]).all())

    def replaced(self, x_UCLHW: Tensor, stride: int = 1) -> Clip:
        """Other values, of videos so many times shorter."""
        return Clip(x_UCLHW, (self.lengths_U + stride - 1) // stride, self.padding)

    def padded(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
        """Values with everything around them that a kernel reads, so that ``ceil(size / stride)`` places come out."""
        x_UCLHW = self._along_time(kernel[0], stride[0])
        pads: list[int] = []
        for size, taps, step in zip(reversed(x_UCLHW.shape[3:]), kernel[:0:-1], stride[:0:-1], strict=True):
            total = max(0, (shortened(size, step) - 1) * step + taps - size)
            pads += [total // 2, total - total // 2]
        return F.pad(x_UCLHW, pads)

    def _along_time(self, taps: int, step: int) -> Tensor:
        if taps == 1 and step == 1:
            return self.x_UCLHW
        length = self.x_UCLHW.shape[2]
        before = (taps - step) // 2 if taps > step else 0
        reach = (shortened(length, step) - 1) * step + taps
        if self.is_even and self.padding == "zeros":
            return F.pad(self.x_UCLHW, (0, 0, 0, 0, before, reach - before - length))
        places_L = torch.arange(reach, device=self.lengths_U.device) - before
        last_U1 = self.lengths_U[:, None] - 1
        index_UL = torch.minimum(places_L.clamp(min=0)[None], last_U1)
        rows_U1 = torch.arange(len(index_UL), device=index_UL.device)[:, None]
        taken = self.x_UCLHW.transpose(1, 2)[rows_U1, index_UL]
        if self.padding == "zeros":
            taken = taken * ((places_L >= 0) & (places_L <= last_U1))[:, :, None, None, None]
        return taken.transpose(1, 2)


class ClipNorm(nn.BatchNorm3d):
    """Batch normalisation that counts the frames of the videos alone.

    Args:
        channels: ``C``.
        has_gain: whether it multiplies as well as shifts.
    """

    def __init__(self, channels: int, has_gain: bool) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)
        if not has_gain:
            self.register_parameter("weight", None)

    def normalised(self, clip: Clip) -> Tensor:
        """Values of a clip, normalised."""
        if not self.training or clip.is_even:
            return super().forward(clip.x_UCLHW)
        frames = clip.x_UCLHW.transpose(1, 2)
        is_valid_UL = valid_mask(clip.lengths_U, frames.shape[1])
        kept = super().forward(frames[is_valid_UL][:, :, None])[:, :, 0]
        return torch.zeros_like(frames).index_put((is_valid_UL,), kept).transpose(1, 2)


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, rectifier.

    Args:
        config: of the encoder.
        channels: in and out.
        kernel: taps along time, rows and columns alike.
        stride: along all three.
    """

    def __init__(self, config: I3dConfig, channels: tuple[int, int], kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel = (kernel if config.kernels == "3d" else 1, kernel, kernel)
        self.stride = (stride, stride, stride)
        self.conv = nn.Conv3d(*channels, self.kernel, self.stride, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.norm = ClipNorm(channels[1], config.norm_gain)

    def forward(self, clip: Clip) -> Clip:
        """Apply to a clip."""
        clip = clip.replaced(self.conv(clip.padded(self.kernel, self.stride)), self.stride[0])
        return clip.replaced(F.relu(self.norm.normalised(clip)))


class Inception(nn.Module):
    """Four branches side by side.

    Args:
        config: of the encoder.
        inputs: channels that come in.
        widths: see ``_MIXED``, already in proportion.
    """

    def __init__(self, config: I3dConfig, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.pool_kernel = (3 if config.kernels == "3d" else 1, 3, 3)
        self.one = ConvUnit(config, (inputs, one))
        self.reduce3 = ConvUnit(config, (inputs, reduce3))
        self.three = ConvUnit(config, (reduce3, three), 3)
        self.reduce5 = ConvUnit(config, (inputs, reduce5))
        self.five = ConvUnit(config, (reduce5, five), 3)
        self.pooled = ConvUnit(config, (inputs, pooled))

    def forward(self, clip: Clip) -> Clip:
        """Apply to a clip."""
        around = clip.replaced(F.max_pool3d(clip.padded(self.pool_kernel, (1, 1, 1)), self.pool_kernel, 1))
        branches = (
            self.one(clip),
            self.three(self.reduce3(clip)),
            self.five(self.reduce5(clip)),
            self.pooled(around),
        )
        return clip.replaced(torch.cat([branch.x_UCLHW for branch in branches], dim=1))


class I3d(Encoder):
    """See :class:`I3dConfig`."""

    config: I3dConfig

    def __init__(self, config: I3dConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.channels(64), config.channels(192)
        self.stem = ConvUnit(config, (3, first), 7, 2)
        self.reduce = ConvUnit(config, (first, first))
        self.conv = ConvUnit(config, (first, second), 3)
        self.mixed = nn.ModuleDict()
        inputs = second
        for name, published in _MIXED.items():
            widths = tuple(config.channels(count) for count in published)
            self.mixed[name] = Inception(config, inputs, widths)
            inputs = widths[0] + widths[2] + widths[4] + widths[5]

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, 3, S, S]``; the pooled vector is the mean over what pairs of steps show."""
        self.require_shape(values)
        clip = self.stem(Clip(values.transpose(1, 2), lengths_U, self.config.time_padding))
        clip = self.conv(self.reduce(self._pool(clip, (1, 3, 3), (1, 2, 2))))
        for name, module in self.mixed.items():
            clip = module(self._pool(clip, *_POOLS[name]) if name in _POOLS else clip)
        x_UTND = clip.x_UCLHW.flatten(3).permute(0, 2, 3, 1)
        steps, places = x_UTND.shape[1:3]
        is_valid_UT = valid_mask(clip.lengths_U, steps)
        # Published: the mean of neighbouring steps, then of those means: the first and the last step count half.
        is_end_UT = (torch.arange(steps, device=values.device) == 0) | ~is_valid_UT.roll(-1, dims=1)
        is_end_UT[:, -1] = True
        weight_UT = is_valid_UT * torch.where(is_end_UT & (clip.lengths_U > 1)[:, None], 0.5, 1.0)
        weight_UT = weight_UT / weight_UT.sum(dim=1, keepdim=True)
        pooled_UD = (x_UTND.mean(dim=2) * weight_UT[..., None]).sum(dim=1)
        return finish(x_UTND.flatten(1, 2), is_valid_UT.repeat_interleave(places, dim=1), pooled_UD)

    def _pool(self, clip: Clip, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Clip:
        taps = (kernel[0] if self.config.kernels == "3d" else 1, *kernel[1:])
        return clip.replaced(F.max_pool3d(clip.padded(taps, stride), taps, stride), stride[0])


def inflated(weights: Mapping[str, Tensor], network: I3d) -> dict[str, Tensor]:
    """Weights of the 2-D network as those of the 3-D one: every tap of time has its share of the 2-D kernel.

    Args:
        weights: state dict of an encoder with ``kernels: 2d``, or of one whose convolutions have no axis of time.
        network: the 3-D encoder.

    Raises:
        CheckpointError: if a tensor does not fit.

    Source: arXiv 1705.07750, section 2.1.
    """
    result = {}
    for name, target in network.state_dict().items():
        if name not in weights:
            raise CheckpointError(f"inflating: the 2-D network has no {name}")
        source = weights[name]
        if target.ndim == 5:
            flat = source if source.ndim == 5 else source[:, :, None]
            source = flat.expand(-1, -1, target.shape[2], -1, -1) / target.shape[2] if flat.shape[2] == 1 else flat
        if source.shape != target.shape:
            raise CheckpointError(f"inflating: {name}: found {tuple(source.shape)}, expected {tuple(target.shape)}")
        result[name] = source.clone()
    return result
