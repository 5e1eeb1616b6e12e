"""Whisper's audio encoder. Legend: ``U`` clips, ``L`` frames, ``M`` mels, ``N`` features, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, all_valid, finish
from polymodal.models.layers import Layout, Transformer, TransformerConfig, sinusoidal
from polymodal.models.layers.convolution import RaggedConv, shortened, valid_mask

FRAMES_PER_FEATURE = 2
"""The second convolution's stride."""
HOP_S = 0.01
"""Time between frames."""


class WhisperConfig(TransformerEncoderConfig):
    """Two convolutions over time, stored positions, a transformer whose keys have no bias.

    Clips are filled with silence to the length that the positions have (30 s as published); what is not filled is
    masked, which published weights have not learned.

    Source: arXiv 2212.04356, section 2.2.
    """

    use: Literal["whisper"] = "whisper"
    modality: ClassVar[str] = "audio"
    num_mels: int = Field(default=80, ge=1)
    """Bands of the log-mel spectrogram (128 in large-v3)."""
    max_features: int = Field(default=1500, ge=1)
    """Positions, and so features of a full clip; two frames of 10 ms make one."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``."""
        return (self.num_mels,)

    def num_features(self, length: int) -> int:
        """One for two frames.

        Raises:
            ConfigError: if the unit is longer than the positions reach.
        """
        count = shortened(length, FRAMES_PER_FEATURE)
        if count > self.max_features:
            raise ConfigError(
                f"whisper: found a clip of {length} frames, expected at most {FRAMES_PER_FEATURE * self.max_features}; "
                "set the reader's clip_s"
            )
        return count

    def default_reader(self) -> AudioReaderConfig:
        """Clips that are filled up to the positions' length."""
        clip_s = self.max_features * FRAMES_PER_FEATURE * HOP_S
        return AudioReaderConfig(num_mels=self.num_mels, clip_s=clip_s, pad_clip=True)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        return super().stack(depth, final_norm).model_copy(update={"key_bias": False})

    def build(self) -> Whisper:
        """The module."""
        return Whisper(self)


class Whisper(Encoder):
    """See :class:`WhisperConfig`."""

    positions_ND: Tensor

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config: WhisperConfig = config
        self.conv1 = RaggedConv(config.num_mels, config.width, 3)
        self.conv2 = RaggedConv(config.width, config.width, 3, FRAMES_PER_FEATURE)
        # Sines and cosines that are never trained, but stored: published files hold them, some rounded to 16 bits.
        self.register_buffer("positions_ND", sinusoidal(config.max_features, config.width))
        self.transformer = Transformer(config.stack())

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode log-mel frames ``[U, L, M]``."""
        self.require_shape(values)
        x_ULD, lengths_U = self.conv1(values, lengths_U)
        x_UND, lengths_U = self.conv2(nn.functional.gelu(x_ULD), lengths_U)
        num = x_UND.shape[1]
        x_UND = nn.functional.gelu(x_UND) + self.positions_ND[: self.config.num_features(values.shape[1])]
        is_valid_UN = valid_mask(lengths_U, num)
        if bool(torch.all(is_valid_UN)):
            return all_valid(self.transformer(x_UND, Layout(causal=False)))
        return finish(self.transformer(x_UND, Layout.padded(is_valid_UN, causal=False)), is_valid_UN)
