"""The number format that a network computes in, and the parameters that keep float32 in a float16 one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def convert(network: nn.Module, dtype: torch.dtype, exact: Collection[str] = ()) -> None:
    """Make ``dtype`` the format of all floats of a network, but of the parameters ``exact``, which become float32.

    Layers of a network of two formats take an input of the other one and answer in their own; sums of both are float32,
    as PyTorch promotes them: behind T5's float32 projections the residual stream does not overflow.

    Args:
        network: its parameters and buffers are converted in place; those that have the format already stay mapped.
        dtype: a floating one.
        exact: full names of parameters.
    """
    seen: set[int] = set()
    for path, module in network.named_modules():
        for name, held in module._parameters.items():
            if held is None or id(held) in seen or not held.is_floating_point():
                continue
            seen.add(id(held))
            own = f"{path}.{name}" if path else name
            held.data = held.data.to(torch.float32 if own in exact else dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    if exact:
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.register_forward_pre_hook(_in_own_format)


def _in_own_format(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
