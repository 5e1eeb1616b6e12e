"""Networks without memory, and weights put into them without a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from polymodal.core.errors import CheckpointError


class _NoDraws(TorchFunctionMode):
    """Draws no numbers for tensors without memory: torch would import its compiler for that, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what has nothing to fill."""
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in _DRAWS and isinstance(filled, Tensor) and filled.device.type == "meta":
            return filled
        return func(*args, **(kwargs or {}))


_DRAWS = frozenset(("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"))
"""Methods of tensors, and functions of ``torch.nn.init``, which reach the mode as a whole."""


@contextmanager
def no_weights() -> Iterator[None]:
    """Within it, the parameters of new modules have a shape and no memory (device ``meta``); buffers are real."""

    def to_meta(module: nn.Module, name: str, parameter: Any) -> Any:
        if isinstance(parameter, nn.Parameter) and parameter.device.type != "meta":
            return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        return None

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with _NoDraws():
            yield
    finally:
        handle.remove()


def wanted_names(network: nn.Module) -> list[str]:
    """Names of parameters and persistent buffers, each tensor once, under its first name."""
    seen: set[int] = set()
    names = []
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            names.append(name)
    return names


def assign(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make ``tensors`` the parameters and buffers of ``network``, without copying them.

    A parameter that stands in several places (tied embeddings) is replaced in all of them.

    Raises:
        CheckpointError: if a shape or the kind of numbers differs, or a name is unknown; nothing has been changed then.
    """
    state = network.state_dict(keep_vars=True)
    wrong = [name for name in tensors if name not in state]
    if wrong:
        raise CheckpointError(f"{source}: the network has no {wrong[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{source}: {name}: found shape {tuple(tensor.shape)}, expected {tuple(state[name].shape)}"
            )
        if state[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: {name}: found {tensor.dtype}, expected a floating-point format; weights that another "
                "library quantised are not read: take the checkpoint that they were made from"
            )
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            if held is not None:
                holders.setdefault(id(held), []).append((module, name))
    for name, tensor in tensors.items():
        old = state[name]
        is_parameter = isinstance(old, nn.Parameter)
        if not is_parameter and tensor.dtype != old.dtype:
            tensor = tensor.to(old.dtype)
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
        for module, attribute in holders[id(old)]:
            held_there: dict[str, Any] = module._parameters if is_parameter else module._buffers
            held_there[attribute] = new


def without_memory(network: nn.Module) -> list[str]:
    """Names of what is still without memory."""
    return [name for name, tensor in network.state_dict(keep_vars=True).items() if tensor.device.type == "meta"]


def main_dtype(network: nn.Module) -> torch.dtype:
    """The number format of most parameters, shared ones once; float32 where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in network.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def num_parameters(network: nn.Module) -> int:
    """Parameters of a network, shared ones once; works without memory."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def materialise(network: nn.Module, names: list[str]) -> None:
    """Give the named parameters zeroed memory; for optional ones that a checkpoint does not hold."""
    state = network.state_dict(keep_vars=True)
    assign(network, {name: torch.zeros(state[name].shape, dtype=state[name].dtype) for name in names}, "network")
