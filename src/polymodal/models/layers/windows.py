"""Attention within windows of a grid, every other block shifted, as Swin has it.

Legend: ``U`` units, ``R`` rows, ``C`` columns of the grid, ``S`` side of a window, ``W`` windows of a unit, ``Q``
places of a window, ``H`` heads, ``K`` width of a head, ``D`` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymodal.models.layers.mlp import MLP, Activation
from polymodal.models.layers.transformer import initialise


class WindowAttention(nn.Module):
    """Attention of each window's places to each other, with a learned bias for their relative position.

    Source: Swin, arXiv 2103.14030, section 3.2.

    Args:
        width: ``D``.
        heads: ``H``.
        side: ``S``.
    """

    place_QQ: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("place_QQ", relative_places(side), persistent=False)

    def forward(self, x_BQD: Tensor, may_attend_WQQ: Tensor | None) -> Tensor:
        """Map windows ``[U * W, S * S, D]``; ``may_attend`` ``[W, S * S, S * S]`` where a shift brought strangers."""
        q, k, v = (
            proj(x_BQD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = self.bias_table[self.place_QQ].permute(2, 0, 1)[None]
        if may_attend_WQQ is not None:
            bias = bias.masked_fill(~may_attend_WQQ[:, None], float("-inf"))
            bias = bias.expand(len(x_BQD) // len(bias), *bias.shape).flatten(0, 1)
        out_BHQK = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        out: Tensor = self.out_proj(out_BHQK.transpose(1, 2).flatten(2))
        return out


class WindowBlock(nn.Module):
    """Window attention and an MLP, each behind a norm and with a residual.

    Args:
        width: ``D``.
        heads: ``H``.
        side: ``S``; the grid's sides are multiples of it.
        shift: by how many places the windows are moved; 0 for every first block of a pair.
        mlp_dim: hidden width of the MLP.
        activation: of the MLP.
        norm_eps: of the norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        side: int,
        *,
        shift: int,
        mlp_dim: int,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = WindowAttention(width, heads, side)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation, gated=False, bias=True)

    def forward(self, x_URCD: Tensor) -> Tensor:
        """Map a grid ``[U, R, C, D]`` to the same shape."""
        rows, columns = x_URCD.shape[1:3]
        # A grid of one window has nobody to shift to.
        shift = self.shift if min(rows, columns) > self.side else 0
        inner = self.attention_norm(x_URCD)
        mask = None
        if shift:
            inner = inner.roll((-shift, -shift), (1, 2))
            mask = same_region(rows, columns, self.side, shift).to(x_URCD.device)
        inner = from_windows(self.attention(to_windows(inner, self.side), mask), rows, columns)
        if shift:
            inner = inner.roll((shift, shift), (1, 2))
        x_URCD = x_URCD + inner
        out: Tensor = x_URCD + self.mlp(self.mlp_norm(x_URCD))
        return out


class PatchMerging(nn.Module):
    """Squares of 2 x 2 places become one of twice the width.

    Source: Swin, arXiv 2103.14030, section 3.1.

    Args:
        width: ``D`` of the input.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.proj = nn.Linear(4 * width, 2 * width, bias=False)
        initialise(self.proj, 1)

    def forward(self, x_URCD: Tensor) -> Tensor:
        """Map ``[U, R, C, D]`` to ``[U, R / 2, C / 2, 2 D]``."""
        parts = [x_URCD[:, row::2, column::2] for column in range(2) for row in range(2)]
        out: Tensor = self.proj(self.norm(torch.cat(parts, dim=-1)))
        return out


def relative_places(side: int) -> Tensor:
    """For each pair of places of a window, the row of the table of biases: ``[S * S, S * S]``.

    Worked example, side 2: the places (0, 0) and (0, 1) are (0, -1) apart, which is row ``1 * 3 + 0``.
    """
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    apart = places[:, :, None] - places[:, None, :] + side - 1
    return apart[0] * (2 * side - 1) + apart[1]


def to_windows(x_URCD: Tensor, side: int) -> Tensor:
    """Windows in reading order: ``[U * W, S * S, D]``."""
    units, rows, columns, width = x_URCD.shape
    cut = x_URCD.view(units, rows // side, side, columns // side, side, width)
    return cut.transpose(2, 3).reshape(-1, side * side, width)


def from_windows(x_BQD: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`to_windows`."""
    side, width = round(x_BQD.shape[1] ** 0.5), x_BQD.shape[2]
    cut = x_BQD.view(-1, rows // side, columns // side, side, side, width)
    return cut.transpose(2, 3).reshape(-1, rows, columns, width)


def same_region(rows: int, columns: int, side: int, shift: int) -> Tensor:
    """``may_attend`` ``[W, S * S, S * S]`` of a grid that was rolled by ``shift``: only what was adjacent before."""

    def regions(length: int) -> Tensor:
        place = torch.arange(length)
        return (place >= length - side).int() + (place >= length - shift).int()

    region = 3 * regions(rows)[:, None] + regions(columns)
    windows_WQ = to_windows(region[None, :, :, None], side)[..., 0]
    return windows_WQ[:, :, None] == windows_WQ[:, None, :]
