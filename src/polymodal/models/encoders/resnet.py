"""The residual network of 2015, with batch norm. Legend: ``U`` images, ``N`` places of the last grid, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, all_valid
from polymodal.models.layers.convolution import shortened

_REDUCTION = 4
"""A bottleneck's inner channels are a quarter of its outer ones."""


class ResnetConfig(EncoderConfig):
    """A residual network; its features are the places of its last grid, its pooled vector their mean.

    A 7x7 stem of stride 2 and a maximum over 3x3 of stride 2, then stages; every stage after the first halves the grid
    and doubles the width. Source: arXiv 1512.03385, section 4.1, with the stride on a bottleneck's 3x3 convolution, as
    published weights have it. For small images and training from random weights, ``cnn`` suits better.
    """

    use: Literal["resnet"] = "resnet"
    modality: ClassVar[str] = "image"
    width: int = Field(default=512, ge=4)
    """Width of the last stage, and so of the features."""
    image_size: int = Field(default=64, ge=1)
    """Side of the square image in pixels."""
    blocks: tuple[int, ...] = Field(default=(2, 2, 2, 2), min_length=1)
    """Residual blocks of each stage."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions (ResNet-18 and 34), or 1x1, 3x3, 1x1 around a quarter of the channels (50 and deeper)."""
    stem_width: int = Field(default=64, ge=1)
    """Channels of the stem."""
    stride_first: bool = False
    """Whether a bottleneck's stride is on its first convolution, as in the paper, or on its second."""

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        halvings = 2 ** (len(self.blocks) - 1) * (_REDUCTION if self.block == "bottleneck" else 1)
        if self.width % halvings:
            raise ValueError(f"width {self.width} is not a multiple of {halvings}, which the earlier stages need")
        if min(self.blocks) < 1:
            raise ValueError(f"found blocks {self.blocks}, expected at least 1 in each stage")
        if self.stride_first and self.block == "basic":
            raise ValueError("'stride_first' belongs to block: bottleneck")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.width // 2 ** (len(self.blocks) - 1 - stage) for stage in range(len(self.blocks)))

    @property
    def grid(self) -> int:
        """Places along one side of the last grid."""
        return shortened(self.image_size, 2 ** (len(self.blocks) + 1))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """One per place of the last grid."""
        return self.grid**2

    def default_reader(self) -> ImageReaderConfig:
        """Images of this size."""
        return ImageReaderConfig(size_px=self.image_size)

    def build(self) -> Resnet:
        """The module."""
        return Resnet(self)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (arXiv 1502.03167) whose running statistics rest while its weight is frozen.

    In training mode with a trainable weight an image's features depend on the others of its batch; otherwise never.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[U, C, H, W]``, normalised per channel."""
        if self.training and self.weight.requires_grad:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the grid, and its norm.

    Args:
        channels: of input and output.
        kernel: side of the kernel.
        stride: of the convolution.
    """

    def __init__(self, channels: tuple[int, int], kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*channels, kernel, stride, kernel // 2, bias=False)
        self.norm = BatchNorm(channels[1])
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[U, C, H, W]`` to ``[U, C', H / stride, W / stride]``."""
        out: Tensor = self.norm(self.conv(x))
        return out


class ResnetBlock(nn.Module):
    """Convolutions around a shortcut.

    Args:
        channels: of input and output.
        stride: of the block.
        config: of the network.
    """

    def __init__(self, channels: tuple[int, int], stride: int, config: ResnetConfig) -> None:
        super().__init__()
        before, after = channels
        if config.block == "bottleneck":
            inner = after // _REDUCTION
            strides = (stride, 1) if config.stride_first else (1, stride)
            layers = [
                ConvNorm((before, inner), 1, strides[0]),
                ConvNorm((inner, inner), 3, strides[1]),
                ConvNorm((inner, after), 1),
            ]
        else:
            layers = [ConvNorm((before, after), 3, stride), ConvNorm((after, after), 3)]
        self.layers = nn.ModuleList(layers)
        self.shortcut = ConvNorm(channels, 1, stride) if stride != 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """``[U, C, H, W]`` to ``[U, C', H / stride, W / stride]``."""
        branch = x
        for layer in self.layers[:-1]:
            branch = F.relu(layer(branch))
        return F.relu(self.layers[-1](branch) + (x if self.shortcut is None else self.shortcut(x)))


class Resnet(Encoder):
    """See :class:`ResnetConfig`."""

    config: ResnetConfig

    def __init__(self, config: ResnetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm((3, config.stem_width), 7, 2)
        stages, channels = [], config.stem_width
        for stage, (count, width) in enumerate(zip(config.blocks, config.widths, strict=True)):
            blocks = []
            for index in range(count):
                blocks.append(ResnetBlock((channels, width), 2 if stage and index == 0 else 1, config))
                channels = width
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode images ``[U, 3, S, S]``."""
        self.require_shape(values, ragged=False)
        x = F.relu(self.stem(values.contiguous(memory_format=torch.channels_last)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        return all_valid(x.flatten(2).transpose(1, 2))
