"""A transformer over a waveform, as wav2vec 2.0 and HuBERT have it.

Legend: ``U`` clips, ``L`` samples, ``C`` channels, ``T`` frames, ``N`` features, ``D`` width, ``K`` kernel.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish
from polymodal.models.layers import Layout, Transformer, TransformerConfig, initialise
from polymodal.models.layers.convolution import valid_mask
from polymodal.models.layers.spans import draw_spans


class Wav2Vec2Config(TransformerEncoderConfig):
    """Convolutions over the samples, a convolution that tells positions, a transformer.

    Source: wav2vec 2.0, arXiv 2006.11477, section 2 (base: ``conv_norm`` group, norms after each sublayer; large models
    trained on 60,000 hours: ``conv_norm`` layer, norms before); HuBERT, arXiv 2106.07447, section III, has the same
    encoder.

    A unit's features are those that it has alone, whatever the batch: where the published code pads a batch of
    ``conv_norm: group`` models, silence enters the statistics of the first norm there, and does not here.
    """

    use: Literal["wav2vec2"] = "wav2vec2"
    modality: ClassVar[str] = "audio"
    conv_dims: tuple[int, ...] = Field(default=(64,) * 7, min_length=1)
    """Channels of each convolution over the samples."""
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Samples, then features, that each of them reads."""
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Their product is the samples that a feature stands for: 320, which is 20 ms at 16 kHz."""
    conv_bias: bool = False
    """Whether the convolutions have a bias."""
    conv_norm: Literal["group", "layer"] = "group"
    """``group``: each channel of the first convolution over the time of a unit; ``layer``: each frame of every one."""
    position_kernel: int = Field(default=128, ge=1)
    """Features that the convolution for relative positions reads."""
    position_groups: int = Field(default=16, ge=1)
    """Groups of channels of that convolution; they divide the width."""
    pre_norm: bool = False
    """Whether norms stand before each sublayer, and once at the end, or after each residual sum."""
    mask_share: float = Field(default=0.0, ge=0, le=1)
    """In training, the share of a clip's features that a learned vector stands in for, in spans; 0: none."""
    mask_span: int = Field(default=10, ge=1)
    """Features of one such span."""
    mask_channel_share: float = Field(default=0.0, ge=0, le=1)
    """In training, the share of channels that are set to zero, in spans; 0: none."""
    mask_channel_span: int = Field(default=10, ge=1)
    """Channels of one such span."""

    @model_validator(mode="after")
    def _convolutions_fit(self) -> Self:
        counts = (len(self.conv_dims), len(self.conv_kernels), len(self.conv_strides))
        if len(set(counts)) != 1:
            raise ValueError(
                f"conv_dims, conv_kernels and conv_strides: found {counts} entries, expected as many of each"
            )
        if min(*self.conv_dims, *self.conv_kernels, *self.conv_strides) < 1:
            raise ValueError("conv_dims, conv_kernels, conv_strides: expected numbers above 0")
        if self.width % self.position_groups:
            raise ValueError(f"width {self.width} is not a multiple of position_groups {self.position_groups}")
        return self

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(1,)``: one sample."""
        return (1,)

    @property
    def shortest(self) -> int:
        """Samples that one feature reads; a shorter clip is completed with silence to this."""
        length = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            length = (length - 1) * stride + kernel
        return length

    def num_features(self, length: int) -> int:
        """Convolutions without padding, one after another; at least one."""
        length = max(length, self.shortest)
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            length = (length - kernel) // stride + 1
        return length

    def default_reader(self) -> AudioReaderConfig:
        """Samples at 16 kHz, each clip with mean 0 and variance 1."""
        return AudioReaderConfig(representation="wave", standardise=True)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        base = super().stack(depth, final_norm and self.pre_norm)
        return base.model_copy(update={"pre_norm": self.pre_norm})

    def build(self) -> Wav2Vec2:
        """The module."""
        return Wav2Vec2(self)


class WaveConvolution(nn.Module):
    """One convolution over time, its norm if it has one, gelu.

    Args:
        config: of the encoder.
        layer: which convolution.
    """

    def __init__(self, config: Wav2Vec2Config, layer: int) -> None:
        super().__init__()
        channels = config.conv_dims[layer]
        inputs = config.conv_dims[layer - 1] if layer else 1
        kernel, stride = config.conv_kernels[layer], config.conv_strides[layer]
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=config.conv_bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.GroupNorm | nn.LayerNorm | None = None
        if config.conv_norm == "layer":
            self.norm = nn.LayerNorm(channels)
        elif layer == 0:
            self.norm = nn.GroupNorm(channels, channels)

    def forward(self, x_UCT: Tensor, lengths_U: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[U, C, T]``; a frame is valid if all that it reads is."""
        x_UCT = self.conv(x_UCT)
        lengths_U = (lengths_U - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        if isinstance(self.norm, nn.GroupNorm):
            x_UCT = over_valid_time(x_UCT, lengths_U, self.norm)
        elif self.norm is not None:
            x_UCT = self.norm(x_UCT.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x_UCT), lengths_U


def over_valid_time(x_UCT: Tensor, lengths_U: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalise each channel over the valid frames of its unit; padding enters no statistic."""
    is_valid_U1T = valid_mask(lengths_U, x_UCT.shape[2])[:, None]
    if bool(is_valid_U1T.all()):
        out: Tensor = norm(x_UCT)
        return out
    count_U11 = lengths_U[:, None, None]
    mean_UC1 = (x_UCT * is_valid_U1T).sum(2, keepdim=True) / count_U11
    centred_UCT = x_UCT - mean_UC1
    variance_UC1 = (centred_UCT.square() * is_valid_U1T).sum(2, keepdim=True) / count_U11
    return centred_UCT * (variance_UC1 + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]


class PositionConvolution(nn.Module):
    """A grouped convolution over features with normalised weights, whose result is added to them.

    Source: wav2vec 2.0, arXiv 2006.11477, section 2; weight normalisation, arXiv 1602.07868, equation 2, with one gain
    for each place of the kernel.

    Args:
        width: ``D``.
        kernel: ``K``; of an even one, the extra place is on the left.
        groups: in which channels are convolved apart.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.direction = nn.Parameter(torch.randn(width, width // groups, kernel))
        self.gain = nn.Parameter(torch.empty(1, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        # As if each weight were drawn with variance 4 / (kernel * width), the published start.
        nn.init.constant_(self.gain, 2 * (width / groups / kernel) ** 0.5)

    def forward(self, x_UND: Tensor) -> Tensor:
        """Map ``[U, N, D]`` to the same shape; what is not valid must be zero."""
        length_11K = torch.linalg.vector_norm(self.direction, dim=(0, 1), keepdim=True)
        weight = self.direction * (self.gain / length_11K)
        out_UDN = F.conv1d(x_UND.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(out_UDN[..., : x_UND.shape[1]]).transpose(1, 2)


class Wav2Vec2(Encoder):
    """See :class:`Wav2Vec2Config`."""

    config: Wav2Vec2Config

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        self.convolutions = nn.ModuleList(WaveConvolution(config, layer) for layer in range(len(config.conv_dims)))
        self.input_norm = nn.LayerNorm(config.conv_dims[-1], eps=config.norm_eps)
        self.input_proj = nn.Linear(config.conv_dims[-1], config.width)
        initialise(self.input_proj, 1)
        self.mask_embed = nn.Parameter(torch.rand(config.width)) if config.mask_share else None
        self.positions = PositionConvolution(config.width, config.position_kernel, config.position_groups)
        self.embed_norm = None if config.pre_norm else nn.LayerNorm(config.width, eps=config.norm_eps)
        self.transformer = Transformer(config.stack())

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode samples ``[U, L, 1]``."""
        self.require_shape(values)
        x_UND, lengths_U = self.frames(values, lengths_U)
        is_valid_UN = valid_mask(lengths_U, x_UND.shape[1])
        if self.training:
            x_UND = self._masked(x_UND, lengths_U)
        x_UND = x_UND.masked_fill(~is_valid_UN[..., None], 0.0)
        x_UND = x_UND + self.positions(x_UND)
        if self.embed_norm is not None:
            x_UND = self.embed_norm(x_UND)
        return finish(self.transformer(x_UND, Layout.padded(is_valid_UN, causal=False)), is_valid_UN)

    def frames(self, values: Tensor, lengths_U: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolutions make of samples: ``[U, N, D]`` and the number of valid ones."""
        shortest = self.config.shortest
        wave_UL = values[..., 0] * valid_mask(lengths_U, values.shape[1])
        x_UCT = F.pad(wave_UL, (0, max(0, shortest - wave_UL.shape[1])))[:, None]
        lengths_U = lengths_U.clamp(min=shortest)
        for layer in self.convolutions:
            x_UCT, lengths_U = layer(x_UCT, lengths_U)
        return self.input_proj(self.input_norm(x_UCT.transpose(1, 2))), lengths_U

    def _masked(self, x_UND: Tensor, lengths_U: Tensor) -> Tensor:
        config = self.config
        units, size, width = x_UND.shape
        if self.mask_embed is not None:
            is_masked_UN = draw_spans(lengths_U.tolist(), size, config.mask_share, config.mask_span)
            x_UND = torch.where(is_masked_UN.to(x_UND.device)[..., None], self.mask_embed.to(x_UND.dtype), x_UND)
        if config.mask_channel_share:
            is_masked_UD = draw_spans([width] * units, width, config.mask_channel_share, config.mask_channel_span)
            x_UND = x_UND.masked_fill(is_masked_UD.to(x_UND.device)[:, None], 0.0)
        return x_UND
