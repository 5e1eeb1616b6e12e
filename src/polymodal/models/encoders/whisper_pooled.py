"""Whisper's encoder over what was recorded alone, its features averaged in pairs, as Qwen2-Audio has it.

Legend: ``U`` clips, ``L`` frames, ``M`` mels, ``N`` features, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, TransformerConfig, sinusoidal
from polymodal.models.layers.convolution import RaggedConv, valid_mask

CONTEXT = 2
"""Frames after the recorded ones that the convolutions read: each reaches one place ahead."""
HOP_S = 0.01
"""Time between frames."""


class WhisperPooledConfig(TransformerEncoderConfig):
    """Whisper's two convolutions, stored positions and transformer; then features are averaged in pairs and normalised.

    A unit ends with two frames that the convolutions read and that become no feature: what stands after a recording in
    a clip that was filled with silence, and zeros after a full clip. Only what was recorded is attended to.

    Source: Qwen2-Audio, arXiv 2407.10759, section 2 (pooling of stride 2; a feature stands for 40 ms).
    """

    use: Literal["whisper_pooled"] = "whisper_pooled"
    modality: ClassVar[str] = "audio"
    num_mels: int = Field(default=80, ge=1)
    """Bands of the log-mel spectrogram (128 as published)."""
    max_features: int = Field(default=1500, ge=1)
    """Positions, before pooling; two frames of 10 ms make one."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``."""
        return (self.num_mels,)

    def num_features(self, length: int) -> int:
        """One for four recorded frames, incomplete ones left out; at least one.

        Raises:
            ConfigError: if the unit is longer than the positions reach.
        """
        return max(1, self._num_states(length) // 2)

    def _num_states(self, length: int) -> int:
        """Features before pooling."""
        count = (max(1, length - CONTEXT) + 1) // 2
        if count > self.max_features:
            raise ConfigError(
                f"whisper_pooled: found a clip of {length - CONTEXT} frames, expected at most {2 * self.max_features}; "
                "set the reader's clip_s"
            )
        return count

    def default_reader(self) -> AudioReaderConfig:
        """Clips that are filled up to the positions' length, then cut to what was recorded and its context."""
        clip_s = self.max_features * 2 * HOP_S
        return AudioReaderConfig(num_mels=self.num_mels, clip_s=clip_s, pad_clip=True, keep_filling=CONTEXT)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        return super().stack(depth, final_norm).model_copy(update={"key_bias": False})

    def build(self) -> WhisperPooled:
        """The module."""
        return WhisperPooled(self)


class WhisperPooled(Encoder):
    """See :class:`WhisperPooledConfig`."""

    config: WhisperPooledConfig
    positions_ND: Tensor

    def __init__(self, config: WhisperPooledConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = RaggedConv(config.num_mels, config.width, 3)
        self.conv2 = RaggedConv(config.width, config.width, 3, 2)
        # Sines and cosines that are never trained, but stored, as Whisper's are.
        self.register_buffer("positions_ND", sinusoidal(config.max_features, config.width))
        self.transformer = Transformer(config.stack(final_norm=False))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode log-mel frames ``[U, L, M]``, the last two of each clip as context."""
        self.require_shape(values)
        num = self.config._num_states(values.shape[1])
        counts_U = ((lengths_U - CONTEXT).clamp(min=1) + 1) // 2
        x_ULD, _ = self.conv1(values, lengths_U)
        x_UND, _ = self.conv2(nn.functional.gelu(x_ULD), lengths_U)
        x_UND = nn.functional.gelu(x_UND[:, :num]) + self.positions_ND[:num]
        is_valid_UN = valid_mask(counts_U, num)
        x_UND = self.transformer(x_UND, Layout.padded(is_valid_UN, causal=False))
        if num == 1:
            return finish(self.final_norm(x_UND), is_valid_UN)
        pooled_UND = self.final_norm((x_UND[:, 0 : num - 1 : 2] + x_UND[:, 1::2]) / 2)
        # A clip of one state has no pair: it stands for itself.
        is_single_U = counts_U == 1
        if bool(is_single_U.any()):
            first_UD = torch.where(is_single_U[:, None], self.final_norm(x_UND[:, 0]), pooled_UND[:, 0])
            pooled_UND = torch.cat((first_UD[:, None], pooled_UND[:, 1:]), dim=1)
        return finish(pooled_UND, valid_mask((counts_U // 2).clamp(min=1), num // 2))
