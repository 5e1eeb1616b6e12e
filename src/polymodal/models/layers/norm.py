"""Normalisation layers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["layer", "rms", "batch"]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the channels of tokens ``[..., D]``; every token counts, so padding must not be there."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape; statistics of the batch while training, the running ones otherwise."""
        return super().forward(input.flatten(0, -2)).view_as(input)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation; a stream of more bits than the weights is normalised before it is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if x.dtype.itemsize > self.weight.dtype.itemsize and not torch.is_autocast_enabled(x.device.type):
            return F.rms_norm(x, self.normalized_shape, eps=self.eps).to(self.weight.dtype) * self.weight
        return super().forward(x)


def build_norm(kind: NormKind, width: int, eps: float, bias: bool = True) -> nn.LayerNorm | nn.RMSNorm | TokenBatchNorm:
    """Layer, root-mean-square or batch normalisation of the last axis.

    Args:
        kind: ``layer`` (mean and variance, Ba et al. 2016), ``rms`` (Zhang and Sennrich 2019, which has no bias) or
            ``batch`` (Ioffe and Szegedy 2015: over the tokens of a batch; PatchTST's).
        width: size of the last axis.
        eps: added to the variance or mean square.
        bias: whether layer normalisation has a shift.
    """
    if kind == "batch":
        return TokenBatchNorm(width, eps=eps)
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    return RMSNorm(width, eps=eps)
