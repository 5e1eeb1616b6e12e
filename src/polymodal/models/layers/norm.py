"""Normalisation layers."""

from __future__ import annotations

from typing import Literal

from torch import nn

NormKind = Literal["layer", "rms"]


def build_norm(kind: NormKind, width: int, eps: float, bias: bool = True) -> nn.LayerNorm | nn.RMSNorm:
    """Layer or root-mean-square normalisation over the last axis.

    Args:
        kind: ``layer`` (mean and variance, Ba et al. 2016) or ``rms`` (Zhang and Sennrich 2019, which has no bias).
        width: size of the last axis.
        eps: added to the variance or mean square.
        bias: whether layer normalisation has a shift.
    """
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    return nn.RMSNorm(width, eps=eps)
