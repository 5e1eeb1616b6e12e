"""Patches embedded and no more: what a joint encoder reads of a picture.

Legend: ``U`` pictures, ``L`` patches, ``N`` features, ``D`` width, ``G`` side of the grid of positions.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.image.patches import PatchesReaderConfig
from polymodal.models.encoders.base import EncoderConfig, Features, finish
from polymodal.models.encoders.masking import PatchMasking
from polymodal.models.layers import LearnedPositions, initialise
from polymodal.models.layers.convolution import valid_mask


class PatchesConfig(EncoderConfig):
    """A linear map of each patch and its position; pictures of any proportions.

    Source: ViLT, arXiv 2102.03334, section 3.1; positions of other grids are interpolated, as its code does.
    """

    use: Literal["patches"] = "patches"
    modality: ClassVar[str] = "image"
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch in pixels."""
    grid: int = Field(default=14, ge=1)
    """Side of the square of learned positions; those of another grid are interpolated between them."""
    cls: bool = False
    """Whether a learned token stands before the patches; it is a feature, and the pooled vector."""
    mask_token: bool = False
    """Whether there is a learned token that stands for hidden patches (masked image modelling)."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """A patch and its place."""
        return (3 * self.patch_size**2 + 2,)

    def num_features(self, length: int) -> int:
        """One per patch, and the ``cls`` token."""
        return length + self.cls

    def default_reader(self) -> PatchesReaderConfig:
        """Square pictures of ``grid`` x ``grid`` patches."""
        return PatchesReaderConfig(patch_size=self.patch_size, size_px=self.grid * self.patch_size)

    def build(self) -> Patches:
        """The module."""
        return Patches(self)


class Patches(PatchMasking):
    """See :class:`PatchesConfig`."""

    config: PatchesConfig

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Linear(3 * config.patch_size**2, width)
        initialise(self.patch_embed, 1)
        self.positions = LearnedPositions(config.grid**2 + config.cls, width)
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5) if config.cls else None
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5) if config.mask_token else None

    @property
    def first_patch(self) -> int:
        """See :class:`PatchMasking`."""
        return int(self.config.cls)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Embed patches ``[U, L, 3 P P + 2]``."""
        return self._embed(values, lengths_U, None)

    def encode_masked(self, values: Tensor, lengths_U: Tensor, is_masked_UL: Tensor) -> Features:
        """See :class:`PatchMasking`."""
        if self.mask_token is None:
            raise ConfigError("encoder patches: has no token for hidden patches; set mask_token: true")
        return self._embed(values, lengths_U, is_masked_UL)

    def _embed(self, values: Tensor, lengths_U: Tensor, is_masked_UL: Tensor | None) -> Features:
        self.require_shape(values)
        x_UND = self.patch_embed(values[..., :-2])
        if is_masked_UL is not None and self.mask_token is not None:
            x_UND = torch.where(is_masked_UL[..., None], self.mask_token.to(x_UND.dtype), x_UND)
        x_UND = x_UND + self._positions(values[..., -2:]).to(x_UND.dtype)
        is_valid_UN = valid_mask(lengths_U, values.shape[1])
        if self.cls_token is None:
            return finish(x_UND, is_valid_UN)
        cls_UD = (self.cls_token + self.positions.weight[0]).to(x_UND.dtype).expand(len(values), -1)
        x_UND = torch.cat([cls_UD[:, None], x_UND], dim=1)
        is_valid_UN = torch.cat([is_valid_UN.new_ones(len(values), 1), is_valid_UN], dim=1)
        return finish(x_UND, is_valid_UN, cls_UD)

    def _positions(self, places_UL2: Tensor) -> Tensor:
        """Bilinear between the four learned positions around each place; exact on the grid itself."""
        side = self.config.grid
        table = self.positions.weight[self.first_patch :]
        at_UL2 = places_UL2.float().clamp(0, 1) * (side - 1)
        # A place that is on the grid but for rounding is on the grid.
        low_UL2 = (at_UL2 + 1e-4).floor().clamp(max=side - 1)
        share_UL2 = (at_UL2 - low_UL2).clamp(0, 1)
        low, high = low_UL2.long(), (low_UL2.long() + 1).clamp(max=side - 1)
        (y, x), (dy, dx) = share_UL2.unbind(-1), (1 - share_UL2).unbind(-1)
        corners = ((low, low, dy, dx), (low, high, dy, x), (high, low, y, dx), (high, high, y, x))
        return torch.stack([table[i[..., 0] * side + j[..., 1]] * (a * b)[..., None] for i, j, a, b in corners]).sum(0)

    def grids(self, values: Tensor, lengths_U: Tensor) -> list[tuple[int, int]]:
        """See :class:`PatchMasking`; the first patch of each row stands at column 0."""
        is_valid_UL = valid_mask(lengths_U, values.shape[1])
        rows: list[int] = ((values[..., -1] == 0) & is_valid_UL).sum(1).tolist()
        lengths: list[int] = lengths_U.tolist()
        return [(count, length // max(count, 1)) for count, length in zip(rows, lengths, strict=True)]

    def patches(self, values: Tensor) -> Tensor:
        """See :class:`PatchMasking`."""
        return values[..., :-2]
