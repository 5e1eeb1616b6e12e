"""Where a token stands: rotary, sinusoidal, learned and two-dimensional codes.

Legend: ``B`` rows, ``T`` tokens, ``H`` heads, ``D`` width, ``K`` width of one head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polymodal.core.errors import ConfigError
from polymodal.models.layers.rope_scaling import RopeScaling


def rope_tables(
    positions_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, T, 1, K]`` of the rotary code, computed in float32.

    The first and the second half of a head are the two coordinates that turn together, as in Llama's published
    weights; pair ``i`` turns by ``position * theta ** (-2 i / K)``, slower with a ``scaling``.

    Source: RoFormer, arXiv 2104.09864, section 3.2 (which interleaves the pairs instead).
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    rates_K, magnitude = theta ** (-steps / head_dim), 1.0
    if scaling is not None:
        longest = int(positions_BT.max()) + 1 if scaling.kind == "longrope" and positions_BT.numel() else 0
        rates_K, magnitude = scaling.slow(rates_K, longest), scaling.magnitude
    angles_BTK = positions_BT[..., None].float() * rates_K
    angles_BTK = torch.cat((angles_BTK, angles_BTK), dim=-1)[:, :, None]
    if magnitude == 1.0:
        return angles_BTK.cos().to(dtype), angles_BTK.sin().to(dtype)
    return (angles_BTK.cos() * magnitude).to(dtype), (angles_BTK.sin() * magnitude).to(dtype)


def rotate(x_BTHK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by the tables of :func:`rope_tables`; shape and dtype stay."""
    turned: Tensor = _Rotation.apply(x_BTHK, *tables)  # type: ignore[no-untyped-call]
    return turned


class _Rotation(torch.autograd.Function):
    """``x * cos + (-second, first) * sin`` of the halves of ``x``; nothing but the tables is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _mixed(x_BTHK, cos, -first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _mixed(grad_BTHK, cos, second, -first), None, None


def _mixed(x_BTHK: Tensor, own: Tensor, to_first: Tensor, to_second: Tensor) -> Tensor:
    """``x * own``, and to each half the other one times its factor."""
    out = x_BTHK * own
    (first, second), (out_first, out_second) = x_BTHK.chunk(2, dim=-1), out.chunk(2, dim=-1)
    out_first.add_(second * to_first)
    out_second.add_(first * to_second)
    return out.to(x_BTHK.dtype)


def rope_2d(grid: int, head_dim: int, reference: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[1, grid ** 2, 1, K]`` of a rotary code over rows and columns, float32.

    A quarter of a head's coordinates turns with the row and a quarter with the column, each with its partner in the
    other half. The grid is spread over ``reference`` places, so that another resolution counts alike.

    Source: EVA-02, arXiv 2303.11331, section 2.1, whose weights interleave the partners.

    Raises:
        ConfigError: if ``head_dim`` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ConfigError(f"two-dimensional rotary code: found a head width of {head_dim}, expected a multiple of 4")
    rates = theta ** (-torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4))
    angles = torch.arange(grid, dtype=torch.float32)[:, None] / grid * reference * rates
    rows, columns = angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)
    both = torch.cat((rows, columns, rows, columns), dim=1)[None, :, None]
    return both.cos(), both.sin()


def sinusoidal(
    length: int, width: int, max_period: float = 10_000.0, device: torch.device | str | None = None
) -> Tensor:
    """Fixed codes ``[length, width]``, float32: sines in the first half, cosines in the second.

    Source: Vaswani et al. 2017, section 3.5, in the half-by-half order of Whisper (arXiv 2212.04356).

    Raises:
        ConfigError: if ``width`` is odd or below 4.
    """
    if width % 2 or width < 4:
        raise ConfigError(f"sinusoidal positions: found width {width}, expected an even number of at least 4")
    half = width // 2
    rates = max_period ** (-torch.arange(half, dtype=torch.float32, device=device) / (half - 1))
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def interleaved_sinusoidal(length: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed codes ``[length, width]``, float32, in which sines and cosines of one rate stand side by side.

    Source: arXiv 1706.03762, section 3.5, as VideoMAE's weights expect it.

    Raises:
        ConfigError: if ``width`` is odd.
    """
    if width % 2:
        raise ConfigError(f"sinusoidal positions: found width {width}, expected an even number")
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def sincos_2d(rows: int, columns: int, width: int, max_period: float = 10_000.0) -> Tensor:
    """Fixed codes ``[rows * columns, width]`` of a grid in reading order: half the width for each axis.

    Source: MAE, arXiv 2111.06377, appendix A.1.

    Raises:
        ConfigError: if ``width`` is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ConfigError(f"two-dimensional positions: found width {width}, expected a multiple of 4, at least 8")
    row_codes = sinusoidal(rows, width // 2, max_period).repeat_interleave(columns, dim=0)
    column_codes = sinusoidal(columns, width // 2, max_period).repeat(rows, 1)
    return torch.cat((row_codes, column_codes), dim=1)


def grid_codes(side: int, width: int) -> Tensor:
    """Fixed codes ``[side ** 2, width]`` of a square grid in reading order, half as large as normalised features.

    As :func:`sincos_2d`, but with wavelengths that fit the grid, centred, and with deviation 0.5 over all places. With
    the usual wavelengths most channels are constant over a small grid: beside features of unit variance the places of
    an 8 x 8 grid then have a variance of 0.07, and a decoder hardly learns to tell where a thing is; with deviation 1
    the places hide what is there (``docs/log.md``).

    Raises:
        ConfigError: if ``width`` is not a multiple of 4, or below 8.
    """
    codes_ND = sincos_2d(side, side, width, max_period=float(max(2, side)))
    codes_ND = codes_ND - codes_ND.mean(dim=0)
    spread = codes_ND.square().mean().sqrt()
    return 0.5 * codes_ND / spread if spread > 0 else codes_ND


class LearnedPositions(nn.Module):
    """One learned vector per position, added to the tokens.

    Args:
        count: how many positions there are.
        width: ``D``.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, positions_BT: Tensor) -> Tensor:
        """Codes ``[B, T, D]`` of int64 positions below ``count``."""
        return nn.functional.embedding(positions_BT, self.weight)

    def first(self, length: int) -> Tensor:
        """Codes ``[length, D]`` of the first positions.

        Raises:
            ConfigError: if ``length`` is above ``count``.
        """
        if length > self.count:
            raise ConfigError(
                f"learned positions: found {length} positions, expected at most {self.count}; raise the maximum"
            )
        return self.weight[:length]


class RelativePositions(nn.Module):
    """One learned number per head and bucket of distances, added to attention scores.

    Near distances have a bucket each, far ones share buckets of logarithmic width up to a largest distance.

    Worked example, 8 buckets up to distance 16, causal: distances 0 .. 3 have the buckets 0 .. 3; 4 and 5 share
    bucket 4, 6 and 7 bucket 5, 8 .. 11 bucket 6, and 12 and more bucket 7.

    Source: T5, arXiv 1910.10683, section 2.1, and its code.

    Args:
        buckets: how many; a bidirectional layout gives half of them to each direction.
        max_distance: from here on all distances share the last bucket.
        heads: ``H``.
    """

    def __init__(self, buckets: int, max_distance: int, heads: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.weight, std=heads**-0.5)

    def forward(self, queries_BT: Tensor, num_keys: int, causal: bool) -> Tensor:
        """What is added to the scores ``[B, H, T, M]`` of queries at these positions and keys at 0 .. M - 1."""
        keys_M = torch.arange(num_keys, device=queries_BT.device)
        bucket_BTM = self.bucket(keys_M - queries_BT[..., None], causal)
        return nn.functional.embedding(bucket_BTM, self.weight).permute(0, 3, 1, 2)

    def bucket(self, offset: Tensor, causal: bool) -> Tensor:
        """Bucket of each int64 offset (key minus query); in a causal layout, keys to the right count as offset 0."""
        count, first = self.buckets, torch.zeros_like(offset)
        if causal:
            distance = (-offset).clamp(min=0)
        else:
            count //= 2
            first, distance = (offset > 0) * count, offset.abs()
        exact = count // 2
        steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (steps * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)
