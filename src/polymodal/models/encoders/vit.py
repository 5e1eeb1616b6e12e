"""The vision transformer.

Legend: ``U`` images, ``N`` patches, ``T`` tokens (class, patches, registers), ``D`` width.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, all_valid
from polymodal.models.layers import Layout, LearnedPositions, Transformer, initialise, sincos_2d


class VitFields(TransformerEncoderConfig, ABC):
    """What a vision transformer is, for images and for the frames of a video."""

    image_size: int = Field(default=64, ge=1)
    """Side of the square image in pixels."""
    patch_size: int = Field(default=8, ge=1)
    """Side of a patch in pixels."""
    stem: Literal["patch", "conv"] = "patch"
    """``patch``: one linear map per patch (arXiv 2010.11929, section 3.1). ``conv``: 3x3 convolutions of stride 2 down
    to the patch grid (arXiv 2106.14881, section 4), for a patch size that is a power of two; better on small data."""
    pool: Literal["mean", "cls"] = "mean"
    """``mean`` of the features, or a ``cls`` token, which is then the pooled vector and no feature."""
    positions: Literal["learned", "sincos"] = "learned"
    """Learned, or fixed sines and cosines of row and column."""
    registers: int = Field(default=0, ge=0)
    """Learned tokens that are read and dropped (arXiv 2309.16588, section 2.2)."""
    embed_norm: bool = False
    """Whether the tokens are normalised before the first block (CLIP)."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    layer: int = Field(default=-1, le=-1)
    """Which hidden state gives the features: -1 the last, normalised; -2 the one before the last block (LLaVA), and so
    on, not normalised. Blocks that are not needed are not built."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        steps = self.patch_size.bit_length() - 1
        if self.stem == "conv" and (self.patch_size != 2**steps or steps < 1 or self.width % 2 ** (steps - 1)):
            raise ValueError(
                "a conv stem needs a patch_size of 2, 4, 8, 16 or 32 and a width that is a multiple of half of it; "
                f"found patch_size {self.patch_size}, width {self.width}"
            )
        if -self.layer > self.depth:
            raise ValueError(
                f"layer {self.layer} leaves no block of depth {self.depth}; expected -{self.depth} or above"
            )
        if self.positions == "sincos" and (self.width % 4 or self.width < 8):
            raise ValueError(f"sincos positions need a width that is a multiple of 4, at least 8; found {self.width}")
        return self


class VitConfig(VitFields):
    """A vision transformer over one image.

    Source: arXiv 2010.11929, section 3.1; mean pooling and fixed positions as an option (arXiv 2205.01580).
    """

    use: Literal["vit"] = "vit"
    modality: ClassVar[str] = "image"

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """One per patch."""
        return self.grid**2

    def default_reader(self) -> ImageReaderConfig:
        """Images of this size."""
        return ImageReaderConfig(size_px=self.image_size)

    def build(self) -> Vit:
        """The module."""
        return Vit(self)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 with doubling widths, then a 1x1 convolution.

    Source: arXiv 2106.14881, section 4; group instead of batch norm, so that images of a batch do not meet.

    Args:
        patch_size: product of the strides.
        width: channels of the result.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        layers: list[nn.Module] = []
        channels = 3
        for step in range(steps):
            out = width // 2 ** (steps - 1 - step)
            layers += [
                nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(math.gcd(8, out), out),
                nn.ReLU(),
            ]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, width, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``[U, 3, S, S]`` to ``[U, D, S / patch, S / patch]``."""
        out: Tensor = self.layers(images)
        return out


class VitTrunk(nn.Module):
    """Images to patch features and a pooled vector; shared by the image encoder and the video encoders.

    Args:
        config: of the encoder.
    """

    positions_TD: Tensor

    def __init__(self, config: VitFields) -> None:
        super().__init__()
        self.config = config
        width, patch, num_patches = config.width, config.patch_size, config.grid**2
        self.patch_embed: nn.Module = (
            ConvStem(patch, width)
            if config.stem == "conv"
            else nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        )
        has_cls = config.pool == "cls"
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5) if has_cls else None
        self.learned_positions: LearnedPositions | None = None
        if config.positions == "learned":
            self.learned_positions = LearnedPositions(num_patches + has_cls, width)
        else:
            codes = sincos_2d(config.grid, config.grid, width)
            codes = torch.cat((torch.zeros(int(has_cls), width), codes))
            self.register_buffer("positions_TD", codes, persistent=False)
        self.registers = nn.Parameter(torch.randn(config.registers, width) * width**-0.5) if config.registers else None
        self.embed_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.embed_norm else None
        self.transformer = Transformer(config.stack(config.depth + 1 + config.layer, final_norm=config.layer == -1))
        initialise(self.patch_embed, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[U, 3, S, S]`` to features ``[U, N, D]`` in reading order and pooled ``[U, D]``."""
        x_UTD = self.patch_embed(images).flatten(2).transpose(1, 2)
        num_patches, num_units = x_UTD.shape[1], x_UTD.shape[0]
        if self.cls_token is not None:
            x_UTD = torch.cat((self.cls_token.expand(num_units, 1, -1), x_UTD), dim=1)
        x_UTD = x_UTD + (self.positions_TD if self.learned_positions is None else self.learned_positions.weight)
        if self.registers is not None:
            x_UTD = torch.cat((x_UTD, self.registers.expand(num_units, -1, -1)), dim=1)
        if self.embed_norm is not None:
            x_UTD = self.embed_norm(x_UTD)
        x_UTD = self.transformer(x_UTD, Layout(causal=False))
        first = 0 if self.cls_token is None else 1
        x_UND = x_UTD[:, first : first + num_patches]
        return x_UND, (x_UND.mean(dim=1) if self.cls_token is None else x_UTD[:, 0])


class Vit(Encoder):
    """See :class:`VitConfig`."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = VitTrunk(config)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode images ``[U, 3, S, S]``."""
        self.require_shape(values, ragged=False)
        return all_valid(*self.trunk(values))
