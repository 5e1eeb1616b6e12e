"""What a vision transformer is, as a config that image and video encoders share."""

from __future__ import annotations

from abc import ABC
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from polymodal.models.encoders.base import TransformerEncoderConfig
from polymodal.models.layers import TransformerConfig


class VitFields(TransformerEncoderConfig, ABC):
    """What a vision transformer is, for images and for the frames of a video."""

    image_size: int = Field(default=64, ge=1)
    """Side of the square image in pixels."""
    patch_size: int = Field(default=8, ge=1)
    """Side of a patch in pixels."""
    drop_rest: bool = False
    """Whether pixels beyond the last whole patch, on the right and below, are left out (SigLIP so400m: 384 pixels and
    patches of 14)."""
    stem: Literal["patch", "conv"] = "patch"
    """``patch``: one linear map per patch (arXiv 2010.11929, section 3.1). ``conv``: 3x3 convolutions of stride 2 down
    to the patch grid (arXiv 2106.14881, section 4), for a patch size that is a power of two; better on small data."""
    pool: Literal["mean", "cls", "cls_mean", "attention"] = "mean"
    """``mean`` of the features; a ``cls`` token, which is then the pooled vector and no feature; ``cls_mean``: their
    mean although there is a ``cls`` token (EVA); or ``attention`` of a learned query to the features, followed by an
    MLP (SigLIP; Zhai et al. 2106.04560, section 3.3)."""
    pooler: bool = False
    """Whether the pooled vector goes through a linear map and tanh (published ViT and BERT models)."""
    pooled_proj: int | None = Field(default=None, ge=1)
    """Width of a linear map of the pooled vector (EVA-CLIP); None: no map."""
    positions: Literal["learned", "sincos"] = "learned"
    """Learned, or fixed sines and cosines of row and column."""
    position_grid: int | None = Field(default=None, ge=1)
    """Side of the grid that learned positions were trained on, where it is not that of the image: they are then
    interpolated (bicubic), as DINOv2's."""
    position_antialias: bool = False
    """Whether that interpolation is antialiased (DINOv2 with registers)."""
    rope_grid: int | None = Field(default=None, ge=1)
    """Side of the grid that a rotary code of row and column counts in, over which the patches are spread (EVA-02: 16);
    None: no rotary code."""
    registers: int = Field(default=0, ge=0)
    """Learned tokens that are read and dropped (arXiv 2309.16588, section 2.2)."""
    embed_norm: bool = False
    """Whether the tokens are normalised before the first block (CLIP)."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    mask_token: bool = False
    """Whether there is a learned vector that stands for masked patches (arXiv 2106.08254, section 2.3)."""
    gated: bool = False
    """Whether the MLPs are gated (DINOv2 giant)."""
    key_bias: bool = True
    """Whether keys have a bias as queries and values do; EVA's have none."""
    sub_norm: Literal["none", "mlp", "both"] = "none"
    """Norms before the last projection of the MLP, or of MLP and attention (EVA-02)."""
    branch_norm: bool = False
    """Whether the norms stand behind each sublayer, before the residual sum (EVA-02 enormous)."""
    layer_scale: float | None = Field(default=None, gt=0)
    """First value of a gain per channel of each sublayer (DINOv2); None: no gain."""
    norm_features: bool = True
    """Whether the last norm is for all features, or for the pooled vector alone (CLIP)."""
    layer: int = Field(default=-1, le=-1)
    """Which hidden state gives the features: -1 the last, normalised; -2 the one before the last block (LLaVA), and so
    on, not normalised. Blocks that are not needed are not built."""

    @property
    def pooled_width(self) -> int:
        """That of the linear map where there is one."""
        return self.pooled_proj or self.width

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        config = super().stack(depth, final_norm)
        more: dict[str, Any] = {
            "gated": self.gated,
            "key_bias": None if self.key_bias else False,
            "layer_scale": self.layer_scale,
        }
        more |= {"sub_norm": self.sub_norm, "branch_norm": self.branch_norm}
        return config.model_copy(update=more)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size < self.patch_size or (self.image_size % self.patch_size and not self.drop_rest):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        steps = self.patch_size.bit_length() - 1
        if self.drop_rest and (self.stem == "conv" or not self.image_size % self.patch_size):
            raise ValueError("'drop_rest' belongs to stem: patch and an image_size that is no multiple of patch_size")
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

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.positions != "learned" and (self.position_grid or self.position_antialias):
            raise ValueError("'position_grid' and 'position_antialias' belong to positions: learned")
        if self.position_antialias and self.position_grid is None:
            raise ValueError("'position_antialias' belongs to a 'position_grid', whose positions are interpolated")
        if self.rope_grid is not None and (self.width // self.heads) % 4:
            raise ValueError(
                f"'rope_grid' needs a head width that is a multiple of 4, found {self.width // self.heads}"
            )
        return self
