"""The modules of a vision transformer.

Legend: ``U`` images, ``N`` patches, ``T`` tokens (class, patches, registers), ``D`` width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.encoders.vit_fields import VitFields
from polymodal.models.layers import (
    MLP,
    Attention,
    Layout,
    LearnedPositions,
    Memory,
    Transformer,
    initialise,
    sincos_2d,
)
from polymodal.models.layers.positions import rope_2d
from polymodal.models.layers.token_merging import ReductionConfig, run_reduced


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


class AttentionPool(nn.Module):
    """A learned query attends to the features; an MLP with a residual follows.

    Source: arXiv 2106.04560, section 3.3, in the form of arXiv 2303.15343.

    Args:
        config: of the encoder; heads, MLP, activation and epsilon are its own.
    """

    def __init__(self, config: VitFields) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attention = Attention(width, heads, heads, width // heads, memory_width=width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.mlp_dim or 4 * width, config.activation, False, True)
        initialise(self, 1)

    def forward(self, x_UND: Tensor) -> Tensor:
        """Features ``[U, N, D]`` to pooled ``[U, D]``."""
        query_U1D = self.query.expand(len(x_UND), 1, -1)
        out_U1D = self.attention.cross(query_U1D, Memory(x_UND), Layout(causal=False))
        out: Tensor = (out_U1D + self.mlp(self.norm(out_U1D)))[:, 0]
        return out


class VitTrunk(nn.Module):
    """Images to patch features and a pooled vector; shared by the image encoder and the video encoders.

    Args:
        config: of the encoder.
        cls_feature: whether the class token is the first feature.
        reduce: how patches become fewer in the blocks; None: they do not.
    """

    positions_TD: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: VitFields, cls_feature: bool = False, reduce: ReductionConfig | None = None) -> None:
        super().__init__()
        self.config, self.cls_feature, self.reduce = config, cls_feature, reduce
        width, patch = config.width, config.patch_size
        self.patch_embed: nn.Module = (
            ConvStem(patch, width)
            if config.stem == "conv"
            else nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        )
        has_cls = config.pool in ("cls", "cls_mean")
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5) if has_cls else None
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5) if config.mask_token else None
        self.learned_positions: LearnedPositions | None = None
        if config.positions == "learned":
            self.learned_positions = LearnedPositions((config.position_grid or config.grid) ** 2 + has_cls, width)
        else:
            codes = sincos_2d(config.grid, config.grid, width)
            codes = torch.cat((torch.zeros(int(has_cls), width), codes))
            self.register_buffer("positions_TD", codes, persistent=False)
        self.registers = nn.Parameter(torch.randn(config.registers, width) * width**-0.5) if config.registers else None
        self.embed_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.embed_norm else None
        reads_last = config.layer == -1
        depth = config.depth + 1 + config.layer
        self.transformer = Transformer(config.stack(depth, final_norm=reads_last and config.norm_features))
        norms_pooled = reads_last and not config.norm_features
        self.pooled_norm = nn.LayerNorm(width, eps=config.norm_eps) if norms_pooled else None
        self.attention_pool = AttentionPool(config) if config.pool == "attention" else None
        self.pooler = nn.Linear(width, width) if config.pooler else None
        self.pooled_proj = nn.Linear(width, config.pooled_proj) if config.pooled_proj else None
        for part in (self.patch_embed, self.pooler, self.pooled_proj):
            if part is not None:
                initialise(part, 1)
        self._add_rope(config, int(has_cls))

    def _add_rope(self, config: VitFields, first: int) -> None:
        """Tables of the two-dimensional rotary code; class token and registers do not turn."""
        if config.rope_grid is None:
            return
        cos, sin = rope_2d(config.grid, config.width // config.heads, config.rope_grid)
        around = (0, 0, 0, 0, first, config.registers)
        self.register_buffer("rope_cos", F.pad(cos, around, value=1.0), persistent=False)
        self.register_buffer("rope_sin", F.pad(sin, around), persistent=False)

    def forward(self, images: Tensor, is_masked_UN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            images: ``[U, 3, S, S]``.
            is_masked_UN: bool, patches that the mask token stands for; needs ``mask_token``.

        Returns:
            Features ``[U, N, D]`` in reading order, the class token before them where it is one, and pooled ``[U, D]``.
        """
        x_UTD = self.embed(images, is_masked_UN)
        num_patches = self.config.grid**2
        first = 0 if self.cls_token is None else 1
        if self.reduce is not None:
            if is_masked_UN is not None:
                raise ConfigError("vit: found masked patches, expected none: 'reduce' leaves no patch in its place")
            return self._reduced(x_UTD, self.reduce, first)
        has_rope = self.config.rope_grid is not None
        rope = (self.rope_cos.to(x_UTD.dtype), self.rope_sin.to(x_UTD.dtype)) if has_rope else None
        x_UTD = self.transformer(x_UTD, Layout(causal=False, rope=rope))
        x_UND = x_UTD[:, 0 if self.cls_feature else first : first + num_patches]
        return x_UND, self._pool(x_UTD, x_UND)

    def _reduced(self, x_UTD: Tensor, reduce: ReductionConfig, first: int) -> tuple[Tensor, Tensor]:
        """The same with fewer patches; the mean counts each patch that a feature stands for."""
        num_patches = self.config.grid**2
        x_UTD, sizes_UT = run_reduced(self.transformer, x_UTD, reduce, first, num_patches)
        last = first + reduce.left(num_patches, len(self.transformer.blocks))
        x_UND = x_UTD[:, 0 if self.cls_feature else first : last]
        if self.cls_token is not None:
            return x_UND, self._pool(x_UTD, x_UND)
        weights_UN = sizes_UT[:, first:last] / sizes_UT[:, first:last].sum(dim=1, keepdim=True)
        mean_U1D = (x_UTD[:, first:last] * weights_UN[..., None]).sum(dim=1, keepdim=True)
        return x_UND, self._pool(x_UTD, mean_U1D)

    def embed(self, images: Tensor, is_masked_UN: Tensor | None = None) -> Tensor:
        """The tokens ``[U, T, D]`` that the first block takes: class token, patches, registers."""
        x_UTD = self.patch_embed(images).flatten(2).transpose(1, 2)
        num_units = x_UTD.shape[0]
        if is_masked_UN is not None:
            if self.mask_token is None:
                raise ConfigError("vit: found masked patches, expected none: there is no mask token; set mask_token")
            x_UTD = torch.where(is_masked_UN[..., None], self.mask_token.to(x_UTD.dtype), x_UTD)
        if self.cls_token is not None:
            x_UTD = torch.cat((self.cls_token.expand(num_units, 1, -1), x_UTD), dim=1)
        x_UTD = x_UTD + self._positions()
        if self.registers is not None:
            x_UTD = torch.cat((x_UTD, self.registers.expand(num_units, -1, -1)), dim=1)
        out_UTD: Tensor = x_UTD if self.embed_norm is None else self.embed_norm(x_UTD)
        return out_UTD

    def _positions(self) -> Tensor:
        """Position codes ``[T, D]`` of class token and patches."""
        if self.learned_positions is None:
            return self.positions_TD
        weight_TD = self.learned_positions.weight
        old, new = self.config.position_grid, self.config.grid
        if old is None or old == new:
            return weight_TD
        codes_TD, first = weight_TD.float(), weight_TD.shape[0] - old**2
        grid_1DYX = codes_TD[first:].T.reshape(1, -1, old, old)
        antialias = self.config.position_antialias
        grid_1DYX = F.interpolate(grid_1DYX, (new, new), mode="bicubic", align_corners=False, antialias=antialias)
        return torch.cat((codes_TD[:first], grid_1DYX[0].flatten(1).T)).to(weight_TD.dtype)

    def _pool(self, x_UTD: Tensor, x_UND: Tensor) -> Tensor:
        if self.attention_pool is not None:
            # It reads normalised features, whether or not the features that are given out are.
            pooled_UD: Tensor = self.attention_pool(x_UND if self.pooled_norm is None else self.pooled_norm(x_UND))
        else:
            pooled_UD = x_UTD[:, 0] if self.config.pool == "cls" else x_UND.mean(dim=1)
            if self.pooled_norm is not None:
                pooled_UD = self.pooled_norm(pooled_UD)
        if self.pooler is not None:
            pooled_UD = self.pooler(pooled_UD).tanh()
        return pooled_UD if self.pooled_proj is None else self.pooled_proj(pooled_UD)
