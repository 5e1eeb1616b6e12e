"""PatchTST: channels one by one through one transformer over patches of time.

Legend: ``U`` windows, ``L`` steps, ``C`` channels, ``P`` patches, ``S`` steps of a patch, ``N = P C``, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.sensor import SensorReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, TransformerConfig, initialise
from polymodal.models.layers.convolution import valid_mask
from polymodal.models.layers.positions import interleaved_sinusoidal


class PatchtstConfig(TransformerEncoderConfig):
    """Each channel is a series of its own: scaled, cut into patches that may overlap, related by attention.

    Source: PatchTST, arXiv 2211.14730, section 3.1. A window shorter than ``context_length`` has fewer patches, counted
    from its end as the published code does, and its last patch stands at the last position.
    """

    use: Literal["patchtst"] = "patchtst"
    modality: ClassVar[str] = "sensor"
    num_channels: int = Field(default=6, ge=1)
    """Channels of a recording."""
    context_length: int = Field(default=512, ge=1)
    """Longest window, in steps; a longer one is refused."""
    patch_size: int = Field(default=16, ge=1)
    """Steps of a patch."""
    stride: int = Field(default=8, ge=1)
    """Steps between the starts of patches."""
    scaling: Literal["std", "mean", "none"] = "std"
    """Each channel of each window less its mean and over its deviation, over its mean size, or as it is."""
    norm: Literal["batch", "layer"] = "batch"
    """Of the transformer's blocks."""
    pre_norm: bool = True
    """Whether norms stand before each sublayer or after the residual sum."""
    positions: Literal["learned", "sincos"] = "sincos"
    """Learned codes of the patches' places, or fixed ones."""
    pool: Literal["mean", "channels"] = "mean"
    """The pooled vector: the mean of all features, or each channel's mean one beside the other (classification)."""

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.patch_size > self.context_length:
            raise ValueError(f"patch_size {self.patch_size} is above context_length {self.context_length}")
        return self

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_channels,)``."""
        return (self.num_channels,)

    @property
    def pooled_width(self) -> int:
        """``width``, or that of every channel."""
        return self.width * (self.num_channels if self.pool == "channels" else 1)

    def num_patches(self, length: int) -> int:
        """Patches of a window; one shorter than a patch is completed in front by its first step."""
        return max(0, length - self.patch_size) // self.stride + 1

    def num_features(self, length: int) -> int:
        """``num_patches x num_channels``, patch by patch."""
        return self.num_patches(length) * self.num_channels

    def default_reader(self) -> SensorReaderConfig:
        """Recordings of this many channels."""
        return SensorReaderConfig(num_channels=self.num_channels)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config; nothing is normalised at its end."""
        config = super().stack(depth, final_norm=False)
        return config.model_copy(update={"norm": self.norm, "pre_norm": self.pre_norm})

    def build(self) -> Patchtst:
        """The module."""
        return Patchtst(self)


class Patchtst(Encoder):
    """See :class:`PatchtstConfig`."""

    config: PatchtstConfig
    position_codes: Tensor

    def __init__(self, config: PatchtstConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_proj = nn.Linear(config.patch_size, config.width)
        count = config.num_patches(config.context_length)
        if config.positions == "learned":
            self.position_codes = nn.Parameter(torch.randn(count, config.width) * config.width**-0.5)
        else:
            codes = interleaved_sinusoidal(count, config.width)
            # The published code centres them and makes them small beside the patches.
            codes = (codes - codes.mean()) / (10.0 * codes.std())
            self.register_buffer("position_codes", codes)
        self.transformer = Transformer(config.stack())
        initialise(self.patch_proj, 1)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode windows ``[U, L, C]``.

        Raises:
            ConfigError: if a window is longer than ``context_length``.
        """
        self.require_shape(values)
        config = self.config
        if int(lengths_U.max()) > config.context_length:
            raise ConfigError(
                f"patchtst: found a window of {int(lengths_U.max())} steps, expected at most context_length "
                f"{config.context_length}; let the reader cut windows (window_s)"
            )
        scaled_ULC = self._scaled(values, valid_mask(lengths_U, values.shape[1])[..., None])
        counts_U = (lengths_U - config.patch_size).clamp(min=0) // config.stride + 1
        most = int(counts_U.max())
        x_UCPD = scaled_ULC.new_zeros(len(values), config.num_channels, most, config.width)
        # Windows of as many patches go together: no padding meets a norm over the batch.
        for count in sorted(set(counts_U.tolist())):
            rows = (counts_U == count).nonzero()[:, 0]
            x_UCPD[rows, :, :count] = self._encode(scaled_ULC[rows], lengths_U[rows], count).to(x_UCPD.dtype)
        is_valid_UP = valid_mask(counts_U, most)
        features = finish(
            x_UCPD.transpose(1, 2).flatten(1, 2), is_valid_UP.repeat_interleave(config.num_channels, dim=1)
        )
        if config.pool == "mean":
            return features
        pooled_UCD = x_UCPD.sum(dim=2) / counts_U[:, None, None]
        return Features(features.x_UND, features.is_valid_UN, pooled_UCD.flatten(1))

    def _encode(self, scaled_ULC: Tensor, lengths_U: Tensor, count: int) -> Tensor:
        """Windows of ``count`` patches each to ``[U, C, count, D]``."""
        config = self.config
        first_U = lengths_U - config.patch_size - config.stride * (count - 1)
        offsets = torch.arange(count, device=lengths_U.device)[:, None] * config.stride
        steps_PS = offsets + torch.arange(config.patch_size, device=lengths_U.device)
        index_UPS = (first_U[:, None, None] + steps_PS).clamp(min=0)
        rows_U11 = torch.arange(len(scaled_ULC), device=lengths_U.device)[:, None, None]
        patches_UCPS = scaled_ULC[rows_U11, index_UPS].permute(0, 3, 1, 2)
        x_UCPD = self.patch_proj(patches_UCPS) + self.position_codes[len(self.position_codes) - count :]
        states: Tensor = self.transformer(x_UCPD.flatten(0, 1), Layout(causal=False))
        return states.view_as(x_UCPD)

    def _scaled(self, values_ULC: Tensor, is_valid_UL1: Tensor) -> Tensor:
        if self.config.scaling == "none":
            return values_ULC
        values_ULC = values_ULC * is_valid_UL1
        num_steps = is_valid_UL1.sum(dim=1, keepdim=True)
        if self.config.scaling == "mean":
            return values_ULC / (values_ULC.abs().sum(dim=1, keepdim=True) / num_steps).clamp(min=1e-10)
        centred_ULC = values_ULC - values_ULC.sum(dim=1, keepdim=True) / num_steps
        variance_U1C = (centred_ULC * is_valid_UL1).square().sum(dim=1, keepdim=True) / num_steps
        return centred_ULC / (variance_U1C + 1e-5).sqrt()
