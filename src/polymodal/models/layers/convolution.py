"""Convolutions over ragged sequences that cannot see padding.

Legend: ``U`` units, ``L`` length, ``C`` channels, ``N`` length after the stride.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def valid_mask(lengths_U: Tensor, length: int) -> Tensor:
    """``is_valid`` ``[U, length]``: True on the first ``lengths_U[u]`` places of row u."""
    return torch.arange(length, device=lengths_U.device) < lengths_U[:, None]


def shortened(length: int, stride: int) -> int:
    """Length after a stride that never drops an end: ``ceil(length / stride)``."""
    return -(-length // stride)


class RaggedConv(nn.Module):
    """A one-dimensional convolution whose result on a unit does not depend on how far the batch pads it.

    Input beyond a unit's length is set to zero before the convolution, so that the end of a unit looks the same alone
    (the convolution's own zero padding) and in a batch. A stride s gives ``ceil(L / s)`` outputs, whatever the kernel.

    Worked example, kernel 3, stride 2, not causal, inputs a b c: the outputs read (0, a, b) and (b, c, 0).

    Args:
        in_channels: ``C`` of the input.
        out_channels: ``C`` of the output.
        kernel: how many inputs an output reads; odd unless causal.
        stride: distance of the outputs.
        dilation: distance of the inputs that one output reads.
        causal: whether an output reads only its own place and earlier ones.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1, causal: bool = False
    ) -> None:
        super().__init__()
        reach = (kernel - 1) * dilation
        self.stride = stride
        self.padding = (reach, 0) if causal else (reach // 2, reach - reach // 2)
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, stride, dilation=dilation)

    def forward(self, x_ULC: Tensor, lengths_U: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[U, L, C]`` and lengths to ``[U, ceil(L / stride), C']`` and the new lengths."""
        x_ULC = x_ULC * valid_mask(lengths_U, x_ULC.shape[1])[..., None]
        x_UCL = nn.functional.pad(x_ULC.transpose(1, 2), self.padding)
        return self.conv(x_UCL).transpose(1, 2), (lengths_U + self.stride - 1) // self.stride
