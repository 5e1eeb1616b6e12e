"""Frequency bands of a sensor window, then a transformer.

Legend: ``U`` windows, ``L`` steps, ``C`` channels, ``N`` frames, ``F`` frequency bins, ``B`` bands, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.sensor import SensorReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, initialise, sinusoidal
from polymodal.models.layers.convolution import shortened, valid_mask


class SpectrumConfig(TransformerEncoderConfig):
    """Magnitudes of short-time Fourier transforms in bands, each frame a token: for vibration and other rhythms.

    Frame i covers steps ``i * hop .. i * hop + window`` under a Hann window, zeros beyond the end; its bands are
    means of ``log(1 + magnitude)`` over runs of bins.
    """

    use: Literal["spectrum"] = "spectrum"
    modality: ClassVar[str] = "sensor"
    num_channels: int = Field(default=6, ge=1)
    """Channels of a recording."""
    window: int = Field(default=32, ge=2)
    """Steps of one transform."""
    hop: int = Field(default=16, ge=1)
    """Steps between transforms; at most ``window``."""
    num_bands: int = Field(default=16, ge=1)
    """Bands of each channel; at most ``window // 2 + 1``."""

    @model_validator(mode="after")
    def _bands_fit(self) -> Self:
        if self.num_bands > self.window // 2 + 1:
            raise ValueError(f"a window of {self.window} has {self.window // 2 + 1} bins, found {self.num_bands} bands")
        if self.hop > self.window:
            raise ValueError(f"hop {self.hop} is above window {self.window}: steps between frames would be lost")
        return self

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_channels,)``."""
        return (self.num_channels,)

    def num_features(self, length: int) -> int:
        """``ceil(length / hop)``."""
        return shortened(length, self.hop)

    def default_reader(self) -> SensorReaderConfig:
        """Recordings of this many channels."""
        return SensorReaderConfig(num_channels=self.num_channels)

    def build(self) -> Spectrum:
        """The module."""
        return Spectrum(self)


class Spectrum(Encoder):
    """See :class:`SpectrumConfig`."""

    config: SpectrumConfig
    hann_W: Tensor
    bands_FB: Tensor

    def __init__(self, config: SpectrumConfig) -> None:
        super().__init__()
        self.config = config
        bins = config.window // 2 + 1
        band_of_bin = torch.arange(bins) * config.num_bands // bins
        bands_FB = nn.functional.one_hot(band_of_bin, config.num_bands).float()
        self.register_buffer("hann_W", torch.hann_window(config.window), persistent=False)
        self.register_buffer("bands_FB", bands_FB / bands_FB.sum(dim=0), persistent=False)
        self.band_proj = nn.Linear(config.num_channels * config.num_bands, config.width)
        self.transformer = Transformer(config.stack())
        initialise(self.band_proj, 1)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode windows ``[U, L, C]``."""
        self.require_shape(values)
        bands_UNF = self.bands(values, lengths_U)
        num = bands_UNF.shape[1]
        x_UND = self.band_proj(bands_UNF) + sinusoidal(num, self.config.width, device=bands_UNF.device).to(bands_UNF)
        is_valid_UN = valid_mask((lengths_U + self.config.hop - 1) // self.config.hop, num)
        return finish(self.transformer(x_UND, Layout.padded(is_valid_UN, causal=False)), is_valid_UN)

    def bands(self, values: Tensor, lengths_U: Tensor) -> Tensor:
        """Log magnitudes ``[U, ceil(L / hop), C * B]``."""
        window, hop = self.config.window, self.config.hop
        values = values * valid_mask(lengths_U, values.shape[1])[..., None]
        num = shortened(values.shape[1], hop)
        padded = nn.functional.pad(values, (0, 0, 0, (num - 1) * hop + window - values.shape[1]))
        # There is no spectrum in half precision.
        frames_UNCW = padded.unfold(1, window, hop).float() * self.hann_W.float()
        magnitude_UNCF = torch.fft.rfft(frames_UNCW).abs()
        bands_UNCB = magnitude_UNCF.log1p() @ self.bands_FB.float()
        bands: Tensor = bands_UNCB.flatten(2).to(values.dtype)
        return bands
