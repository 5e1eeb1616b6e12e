"""Dilated convolutions over a sensor window. Legend: ``U`` windows, ``L`` steps, ``C`` channels, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.sensor import SensorReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, finish
from polymodal.models.layers.convolution import RaggedConv, shortened, valid_mask


class TcnConfig(EncoderConfig):
    """Residual blocks whose dilation doubles, so that the last one sees far.

    As in the paper: two dilated convolutions a block, dilation ``2 ** i``, a residual around each block, causal where
    asked for, dropout on the branch. One feature reads ``max(kernel, stride) + 2 stride (kernel - 1) (2 ** depth - 1)``
    steps of the window (section 3.3, with two convolutions a block, behind the stem).

    Source: TCN, arXiv 1803.01271, section 3. Deviations: a strided stem shortens the window first, so that a residual
    needs no 1x1 convolution; layer in place of weight norm, so that no window depends on how weights are written;
    pre-activation with gelu in place of post-activation with a rectifier; not causal unless asked for.
    """

    use: Literal["tcn"] = "tcn"
    modality: ClassVar[str] = "sensor"
    num_channels: int = Field(default=6, ge=1)
    """Channels of a recording."""
    stride: int = Field(default=4, ge=1)
    """Steps that one feature stands for."""
    depth: int = Field(default=4, ge=1)
    """Blocks; block i has dilation 2 ** i."""
    kernel: int = Field(default=3, ge=1)
    """Steps that one convolution reads."""
    causal: bool = False
    """Whether a feature depends on its own and earlier steps alone."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_channels,)``."""
        return (self.num_channels,)

    @model_validator(mode="after")
    def _reach_is_sane(self) -> Self:
        if self.depth > 16:
            raise ValueError(f"found depth {self.depth}, expected at most 16: dilation doubles with every block")
        return self

    @property
    def reach(self) -> int:
        """Steps of the window that one feature depends on, away from its ends."""
        return max(self.kernel, self.stride) + 2 * self.stride * (self.kernel - 1) * ((1 << self.depth) - 1)

    def num_features(self, length: int) -> int:
        """``ceil(length / stride)``."""
        return shortened(length, self.stride)

    def default_reader(self) -> SensorReaderConfig:
        """Recordings of this many channels."""
        return SensorReaderConfig(num_channels=self.num_channels)

    def build(self) -> Tcn:
        """The module."""
        return Tcn(self)


class TcnBlock(nn.Module):
    """Two dilated convolutions with a residual; norms act on each place alone.

    Args:
        config: of the encoder.
        dilation: of both convolutions.
    """

    def __init__(self, config: TcnConfig, dilation: int) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width)
        self.conv1 = RaggedConv(width, width, config.kernel, dilation=dilation, causal=config.causal)
        self.norm2 = nn.LayerNorm(width)
        self.conv2 = RaggedConv(width, width, config.kernel, dilation=dilation, causal=config.causal)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_UND: Tensor, lengths_U: Tensor) -> Tensor:
        """Map ``[U, N, D]`` to the same shape."""
        branch_UND, _ = self.conv1(nn.functional.gelu(self.norm1(x_UND)), lengths_U)
        branch_UND, _ = self.conv2(nn.functional.gelu(self.norm2(branch_UND)), lengths_U)
        out: Tensor = x_UND + self.dropout(branch_UND)
        return out


class Tcn(Encoder):
    """See :class:`TcnConfig`."""

    def __init__(self, config: TcnConfig) -> None:
        super().__init__()
        self.config = config
        kernel = max(config.kernel, config.stride)
        self.stem = RaggedConv(config.num_channels, config.width, kernel, config.stride, causal=config.causal)
        self.blocks = nn.ModuleList(TcnBlock(config, 2**index) for index in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode windows ``[U, L, C]``."""
        self.require_shape(values)
        x_UND, lengths_U = self.stem(values, lengths_U)
        for block in self.blocks:
            x_UND = block(x_UND, lengths_U)
        return finish(self.final_norm(x_UND), valid_mask(lengths_U, x_UND.shape[1]))
