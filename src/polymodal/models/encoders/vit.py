"""The vision transformer over one image. Legend: ``U`` images, ``N`` patches, ``D`` width."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.encoders.base import Features, all_valid
from polymodal.models.encoders.masking import PatchMasking
from polymodal.models.encoders.vit_fields import VitFields
from polymodal.models.encoders.vit_trunk import VitTrunk
from polymodal.models.layers.token_merging import REDUCTIONS

__all__ = ["Vit", "VitConfig", "VitFields", "VitTrunk"]


class VitConfig(VitFields):
    """A vision transformer over one image.

    Source: arXiv 2010.11929, section 3.1; mean pooling and fixed positions as an option (arXiv 2205.01580).
    """

    use: Literal["vit"] = "vit"
    modality: ClassVar[str] = "image"
    cls_feature: bool = False
    """Whether the ``cls`` token is a feature too, the first one (BLIP, FLAVA)."""
    reduce: REDUCTIONS.field() | None = None  # type: ignore[valid-type]
    """How patches become fewer on their way through the blocks: ``merge`` like ones (ToMe), or ``prune`` those that the
    class token ignores (EViT); no weights are needed for it."""

    @model_validator(mode="after")
    def _can_reduce(self) -> Self:
        if self.reduce is None:
            return self
        if self.rope_grid is not None:
            raise ValueError("reduce: found a rotary code of row and column, which merged patches do not have")
        if self.pool in ("attention", "cls_mean") or (self.reduce.use == "prune" and self.pool != "cls"):
            expected = "'cls'" if self.reduce.use == "prune" else "'cls' or 'mean'"
            raise ValueError(f"reduce {self.reduce.use}: found pool {self.pool!r}, expected {expected}")
        self.reduce.schedule(self.grid**2, self.depth + 1 + self.layer)
        return self

    @model_validator(mode="after")
    def _has_cls(self) -> Self:
        if self.cls_feature and self.pool != "cls":
            raise ValueError("'cls_feature' belongs to pool: cls; without it there is no such token")
        return self

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def num_features(self, length: int) -> int:
        """One per patch, less those that ``reduce`` takes; and the class token with ``cls_feature``."""
        left: int = self.grid**2
        if self.reduce is not None:
            left = self.reduce.left(left, self.depth + 1 + self.layer)
        return left + self.cls_feature

    def default_reader(self) -> ImageReaderConfig:
        """Images of this size."""
        return ImageReaderConfig(size_px=self.image_size)

    def build(self) -> Vit:
        """The module."""
        return Vit(self)


class Vit(PatchMasking):
    """See :class:`VitConfig`."""

    config: VitConfig

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = VitTrunk(config, config.cls_feature, config.reduce)

    def forward(self, values: Tensor, lengths_U: Tensor, is_masked_UN: Tensor | None = None) -> Features:
        """Encode images ``[U, 3, S, S]``; ``is_masked_UN``: bool, patches that the mask token stands for."""
        self.require_shape(values, ragged=False)
        return all_valid(*self.trunk(values, is_masked_UN))

    def normed(self, features: Features) -> Tensor:
        """See :meth:`Encoder.normed`."""
        norm = self.trunk.pooled_norm
        return features.x_UND if norm is None else torch.as_tensor(norm(features.x_UND))

    def encode_masked(self, values: Tensor, lengths_U: Tensor, is_masked_UL: Tensor) -> Features:
        """See :class:`PatchMasking`."""
        return self(values, lengths_U, is_masked_UL)  # type: ignore[no-any-return]

    @property
    def first_patch(self) -> int:
        """See :class:`PatchMasking`."""
        return int(self.config.cls_feature)

    def grids(self, values: Tensor, lengths_U: Tensor) -> list[tuple[int, int]]:
        """See :class:`PatchMasking`."""
        return [(self.config.grid, self.config.grid)] * len(values)

    def patches(self, values: Tensor) -> Tensor:
        """See :class:`PatchMasking`; channel by channel, in reading order."""
        side = self.config.patch_size
        return F.unfold(values, side, stride=side).transpose(1, 2)
