"""Where a token stands: rotary, sinusoidal, learned and two-dimensional codes.

Legend: ``B`` rows, ``T`` tokens, ``H`` heads, ``D`` width, ``K`` width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polymodal.core.errors import ConfigError


def rope_tables(positions_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, T, 1, K]`` of the rotary code, computed in float32.

    The first and the second half of a head are the two coordinates that turn together, as in Llama's published
    weights; pair ``i`` turns by ``position * theta ** (-2 i / K)``.

    Source: RoFormer, arXiv 2104.09864, section 3.2 (which interleaves the pairs instead).
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    angles_BTK = positions_BT[..., None].float() * theta ** (-steps / head_dim)
    angles_BTK = torch.cat((angles_BTK, angles_BTK), dim=-1)[:, :, None]
    return angles_BTK.cos().to(dtype), angles_BTK.sin().to(dtype)


def rotate(x_BTHK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by the tables of :func:`rope_tables`; shape and dtype stay."""
    cos, sin = tables
    first, second = x_BTHK.chunk(2, dim=-1)
    turned = x_BTHK * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.to(x_BTHK.dtype)


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


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """Fixed codes ``[rows * columns, width]`` of a grid in reading order: half the width for each axis.

    Source: MAE, arXiv 2111.06377, appendix A.1.

    Raises:
        ConfigError: if ``width`` is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ConfigError(f"two-dimensional positions: found width {width}, expected a multiple of 4, at least 8")
    row_codes = sinusoidal(rows, width // 2).repeat_interleave(columns, dim=0)
    column_codes = sinusoidal(columns, width // 2).repeat(rows, 1)
    return torch.cat((row_codes, column_codes), dim=1)


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
