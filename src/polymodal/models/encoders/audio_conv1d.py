"""Strided convolutions over log-mel frames.

Legend: ``U`` clips, ``L`` frames, ``M`` mels, ``N`` features, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, finish
from polymodal.models.layers.convolution import RaggedConv, shortened, valid_mask


class AudioConv1dConfig(EncoderConfig):
    """Residual blocks of strided one-dimensional convolutions over log-mel frames: small, fast, local."""

    use: Literal["audio_conv1d"] = "audio_conv1d"
    modality: ClassVar[str] = "audio"
    num_mels: int = Field(default=64, ge=1)
    """Bands of the log-mel spectrogram."""
    strides: tuple[int, ...] = Field(default=(2, 2, 2), min_length=1)
    """One block for each; a feature stands for as many frames as their product."""
    kernel: int = Field(default=5, ge=1)
    """Frames that one convolution reads."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``."""
        return (self.num_mels,)

    def num_features(self, length: int) -> int:
        """``length`` divided by each stride in turn, rounded up."""
        for stride in self.strides:
            length = shortened(length, stride)
        return length

    def default_reader(self) -> AudioReaderConfig:
        """Log-mel frames of this many bands."""
        return AudioReaderConfig(num_mels=self.num_mels)

    def build(self) -> AudioConv1d:
        """The module."""
        return AudioConv1d(self)


class ConvBlock(nn.Module):
    """A strided convolution, then a residual one; norms act on each place alone.

    Args:
        in_channels: channels of the input.
        width: channels of the output.
        kernel: of both convolutions.
        stride: of the first.
    """

    def __init__(self, in_channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.down = RaggedConv(in_channels, width, kernel, stride)
        self.norm = nn.LayerNorm(width)
        self.conv = RaggedConv(width, width, kernel)

    def forward(self, x_ULC: Tensor, lengths_U: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[U, L, C]`` to ``[U, ceil(L / stride), D]``."""
        x_UND, lengths_U = self.down(x_ULC, lengths_U)
        branch_UND, _ = self.conv(nn.functional.gelu(self.norm(x_UND)), lengths_U)
        return x_UND + nn.functional.gelu(branch_UND), lengths_U


class AudioConv1d(Encoder):
    """See :class:`AudioConv1dConfig`."""

    def __init__(self, config: AudioConv1dConfig) -> None:
        super().__init__()
        self.config = config
        channels = [config.num_mels] + [config.width] * (len(config.strides) - 1)
        self.blocks = nn.ModuleList(
            ConvBlock(inner, config.width, config.kernel, stride)
            for inner, stride in zip(channels, config.strides, strict=True)
        )
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode log-mel frames ``[U, L, M]``."""
        self.require_shape(values)
        x_UND = values
        for block in self.blocks:
            x_UND, lengths_U = block(x_UND, lengths_U)
        return finish(self.final_norm(x_UND), valid_mask(lengths_U, x_UND.shape[1]))
