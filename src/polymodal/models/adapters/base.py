"""What an adapter is, and how a module takes several in under names.

An adapted module stays the object that it was: its class becomes a subclass of its own class, so that every place that
holds it sees the adapters, and its parameters keep their names, values and storage. The adapters stand beside them,
``<module>.adapters.<name>.<parameter>``.

Legend: ``...`` any leading axes, ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.models.layers.attention import Attention, Step, chosen

DEFAULT = "default"
"""The name of an adapter that was given none."""


class AdapterConfig(Config):
    """Base of the adapters' configs.

    Args:
        match: which modules take one, as paths from the adapted part or patterns with ``*``.
    """

    noun: ClassVar[str] = "linear layer"
    """What it stands on, for messages."""
    is_mergeable: ClassVar[bool] = False
    """Whether it can be merged into the weights without changing any output."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1)

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """``(field, pattern)`` of everything that must match something."""
        return tuple(("match", pattern) for pattern in self.match)

    def fits(self, module: nn.Module, field: str) -> bool:
        """Whether a module is of the kind that the patterns of ``field`` choose from."""
        return is_linear(module)

    def build(self, module: nn.Module, path: str) -> Adapter:
        """A new adapter for a module.

        Args:
            module: what it will stand on.
            path: the module's path within the adapted part.
        """
        raise NotImplementedError

    def same_shape(self, other: AdapterConfig) -> bool:
        """Whether an adapter of ``other`` is one of this, whatever the patterns that chose its place."""
        ours, theirs = self.to_data(), other.to_data()
        for data in (ours, theirs):
            for field, _ in self.targets:
                data.pop(field, None)
        return type(self) is type(other) and ours == theirs


class Adapter(nn.Module):
    """One adapter on one module: what it does to the module's input and output. The base does nothing.

    Args:
        config: how it was made.
    """

    asleep: ClassVar[tuple[str, ...]] = ()
    """Parameters whose first gradient is zero, because what they multiply starts at zero."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config

    def change_input(self, x: Tensor) -> Tensor:
        """What the module, and every other adapter on it, reads in place of ``x``."""
        return x

    def update(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor | None:
        """What is added to the module's output ``y``; the sum over all adapters does not depend on their order."""
        return None

    def change_output(self, y: Tensor) -> Tensor:
        """What leaves in place of ``y``, after all updates."""
        return y

    def merged(self, weight: Tensor) -> Tensor | None:
        """What :meth:`update` adds to the weight, given the frozen one; None where it adds nothing."""
        return None

    def gains(self) -> tuple[Tensor | None, Tensor | None]:
        """Factors ``[I]`` of the inputs and ``[O]`` of the outputs."""
        return None, None


class Adapted(nn.Module):
    """A module with adapters; those in ``active`` act."""

    adapters: nn.ModuleDict
    active: tuple[str, ...]

    @property
    def chosen(self) -> list[Adapter]:
        """The adapters that act, in order."""
        return [self.adapters[name] for name in self.active]  # type: ignore[misc]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with the adapters around it."""
        return self.around(super().forward, x, *args, **kwargs)

    def around(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``call`` with the adapters around it."""
        chosen = self.chosen
        for adapter in chosen:
            x = adapter.change_input(x)
        base: Tensor = call(x, *args, **kwargs)
        y = base
        for adapter in chosen:
            update = adapter.update(x, base, self)
            y = y if update is None else y + update
        for adapter in chosen:
            y = adapter.change_output(y)
        return y


class AdaptedAttention(Adapted, Attention):
    """Attention with adapters, to itself and to a memory."""

    def forward(self, x_BTD: Tensor, step: Step, layer: int, read_K: Tensor | None = None) -> Tensor:
        """See :meth:`Attention.forward`; an adapter beside it sees every token, so that none is left out before."""
        out_BTD: Tensor = super().forward(x_BTD, step, layer)
        return out_BTD if read_K is None else chosen(out_BTD, read_K)

    def cross(self, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`Attention.cross`."""
        return self.around(super().cross, x_BTD, *args, **kwargs)


_CLASSES: dict[type, type] = {Attention: AdaptedAttention}


def adapted_class(own: type) -> Callable[[type], type]:
    """Register the adapted class of ``own``, for modules that need another forward than :class:`Adapted`'s."""

    def register(adapted: type) -> type:
        _CLASSES[own] = adapted
        return adapted

    return register


@cache
def _class_of(own: type) -> type:
    return _CLASSES.get(own) or type(f"Adapted{own.__name__}", (Adapted, own), {"__module__": own.__module__})


def plain(module: nn.Module) -> type:
    """The module's class as it is without adapters."""
    own = type(module)
    if not isinstance(module, Adapted):
        return own
    return next(base for base in own.__mro__[1:] if not issubclass(base, Adapted))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; also one stored in fewer bits, but no class that computes otherwise."""
    own = plain(module)
    return own is nn.Linear or (issubclass(own, nn.Linear) and hasattr(own, "dequantised"))


def attach(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Give a module an adapter that acts from now on."""
    if not isinstance(module, Adapted):
        module.__class__ = _class_of(type(module))  # type: ignore[arg-type]
        assert isinstance(module, Adapted)
        module.adapters = nn.ModuleDict()
        module.active = ()
    adapter.train(module.training)
    module.adapters[name] = adapter
    module.active = (*module.active, name)


def detach(module: Adapted, names: Iterable[str]) -> dict[str, Adapter]:
    """Take adapters out; a module without any is of its own class again."""
    taken: dict[str, Adapter] = {}
    for name in names:
        taken[name] = module.adapters.pop(name)  # type: ignore[assignment]
    module.active = tuple(name for name in module.active if name not in taken)
    if not module.adapters:
        own = plain(module)
        del module.adapters, module.active
        module.__class__ = own
    return taken


def adapted_modules(module: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every module with adapters, by its path, in module order."""
    for path, inner in module.named_modules():
        if isinstance(inner, Adapted):
            yield path, inner


def plain_weight(weight: Tensor) -> Tensor:
    """A weight as a plain tensor, whatever form it is stored in."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    return torch.as_tensor(weight.dequantize())
