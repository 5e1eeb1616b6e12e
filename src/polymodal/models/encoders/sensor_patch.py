"""Patches of a sensor window, then a transformer.

Legend: ``U`` windows, ``L`` steps, ``C`` channels, ``P`` patches, ``N`` features, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.modalities.sensor import SensorReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, initialise, sinusoidal
from polymodal.models.layers.convolution import shortened, valid_mask


class SensorPatchConfig(TransformerEncoderConfig):
    """Steps are cut into patches, each patch becomes a token.

    Source: PatchTST, arXiv 2211.14730, section 3.1. Deviations: patches do not overlap; values are not normalised per
    window (the reader's constants are), since their size carries meaning; fixed positions, so that any length fits.
    A last patch that is not full is completed with zeros.
    """

    use: Literal["sensor_patch"] = "sensor_patch"
    modality: ClassVar[str] = "sensor"
    num_channels: int = Field(default=6, ge=1)
    """Channels of a recording."""
    patch_size: int = Field(default=8, ge=1)
    """Steps of a patch."""
    channels: Literal["joint", "separate"] = "joint"
    """``joint``: a token holds a patch of all channels. ``separate``: each channel is a sequence of its own through the
    same weights (PatchTST's channel independence); features stand patch by patch, channel by channel."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_channels,)``."""
        return (self.num_channels,)

    def num_features(self, length: int) -> int:
        """``ceil(length / patch_size)``, for every channel where they are separate."""
        return shortened(length, self.patch_size) * (self.num_channels if self.channels == "separate" else 1)

    def default_reader(self) -> SensorReaderConfig:
        """Recordings of this many channels."""
        return SensorReaderConfig(num_channels=self.num_channels)

    def build(self) -> SensorPatch:
        """The module."""
        return SensorPatch(self)


class SensorPatch(Encoder):
    """See :class:`SensorPatchConfig`."""

    config: SensorPatchConfig

    def __init__(self, config: SensorPatchConfig) -> None:
        super().__init__()
        self.config = config
        separate = config.channels == "separate"
        self.patch_proj = nn.Linear(config.patch_size * (1 if separate else config.num_channels), config.width)
        codes = torch.randn(config.num_channels, config.width) * config.width**-0.5
        self.channel_codes = nn.Parameter(codes) if separate else None
        self.transformer = Transformer(config.stack())
        initialise(self.patch_proj, 1)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode windows ``[U, L, C]``."""
        self.require_shape(values)
        size = self.config.patch_size
        values = values * valid_mask(lengths_U, values.shape[1])[..., None]
        values = nn.functional.pad(values, (0, 0, 0, -values.shape[1] % size))
        num_units, length, channels = values.shape
        cut_UPLC = values.view(num_units, length // size, size, channels)
        is_valid_UP = valid_mask((lengths_U + size - 1) // size, length // size)
        if self.channel_codes is None:
            x_UPD = self._positioned(self.patch_proj(cut_UPLC.flatten(2)))
            return finish(self.transformer(x_UPD, Layout.padded(is_valid_UP, causal=False)), is_valid_UP)
        # Channels become rows: [U, P, L, C] -> [U * C, P, L].
        rows = self._positioned(self.patch_proj(cut_UPLC.permute(0, 3, 1, 2)).flatten(0, 1))
        codes = self.channel_codes.repeat(num_units, 1)[:, None]
        layout = Layout.padded(is_valid_UP.repeat_interleave(channels, dim=0), causal=False)
        x_UCPD = self.transformer(rows + codes, layout).view(num_units, channels, -1, self.config.width)
        x_UND = torch.transpose(x_UCPD, 1, 2).flatten(1, 2)
        return finish(x_UND, is_valid_UP.repeat_interleave(channels, dim=1))

    def _positioned(self, x_UPD: Tensor) -> Tensor:
        return x_UPD + sinusoidal(x_UPD.shape[1], x_UPD.shape[2], device=x_UPD.device).to(x_UPD)
