"""A transformer over log-mel frames. Legend: ``U`` clips, ``L`` frames, ``M`` mels, ``N`` features, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, sinusoidal
from polymodal.models.layers.convolution import RaggedConv, shortened, valid_mask

Stride = Literal[1, 2, 4]


class AudioTransformerConfig(TransformerEncoderConfig):
    """Two convolutions over time, fixed positions, a transformer.

    Source: Whisper, arXiv 2212.04356, section 2.2 (strides 1 and 2 there); any length, where Whisper pads to 30 s.
    """

    use: Literal["audio_transformer"] = "audio_transformer"
    modality: ClassVar[str] = "audio"
    num_mels: int = Field(default=64, ge=1)
    """Bands of the log-mel spectrogram."""
    strides: tuple[Stride, Stride] = (2, 2)
    """Of the two convolutions; a feature stands for as many frames as their product."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``."""
        return (self.num_mels,)

    def num_features(self, length: int) -> int:
        """``ceil(ceil(length / first stride) / second stride)``."""
        return shortened(shortened(length, self.strides[0]), self.strides[1])

    def default_reader(self) -> AudioReaderConfig:
        """Log-mel frames of this many bands."""
        return AudioReaderConfig(num_mels=self.num_mels)

    def build(self) -> AudioTransformer:
        """The module."""
        return AudioTransformer(self)


class AudioTransformer(Encoder):
    """See :class:`AudioTransformerConfig`."""

    def __init__(self, config: AudioTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = RaggedConv(config.num_mels, config.width, 3, config.strides[0])
        self.conv2 = RaggedConv(config.width, config.width, 3, config.strides[1])
        self.transformer = Transformer(config.stack())

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode log-mel frames ``[U, L, M]``."""
        self.require_shape(values)
        x_ULD, lengths_U = self.conv1(values, lengths_U)
        x_UND, lengths_U = self.conv2(nn.functional.gelu(x_ULD), lengths_U)
        num, width = x_UND.shape[1:]
        x_UND = nn.functional.gelu(x_UND) + sinusoidal(num, width, device=x_UND.device).to(x_UND)
        is_valid_UN = valid_mask(lengths_U, num)
        return finish(self.transformer(x_UND, Layout.padded(is_valid_UN, causal=False)), is_valid_UN)
