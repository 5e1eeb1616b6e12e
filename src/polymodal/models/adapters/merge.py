"""Merging adapters into the weights, exactly, and taking it back to the bit.

Legend: ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.adapters.apply import adapter_names
from polymodal.models.adapters.base import Adapted, Adapter, adapted_modules, attach, detach
from polymodal.models.adapters.dora import DoRA
from polymodal.models.adapters.ia3 import IA3


@dataclass(slots=True)
class Merged:
    """What a merge did.

    Args:
        layers: paths of the merged layers.
    """

    layers: list[str] = field(default_factory=list)
    _records: list[_Record] = field(default_factory=list)

    def undo(self) -> None:
        """Put the old weights and the adapters back; the weights are the same to the bit."""
        for record in reversed(self._records):
            record.layer.weight = record.weight
            if record.bias is not None:
                record.layer.bias = record.bias
            for name, adapter in record.adapters.items():
                attach(record.layer, name, adapter)
            assert isinstance(record.layer, Adapted)
            record.layer.active = record.active
        self._records.clear()


@dataclass(slots=True)
class _Record:
    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: dict[str, Adapter]
    active: tuple[str, ...]


def merge_adapters(module: nn.Module, names: Iterable[str] | None = None) -> Merged:
    """Add adapters to the weights that they stand on, and take them out.

    The sum is formed in float32 (float64 for such weights). A weight that is shared with another module is copied
    first, so that the other one keeps its values.

    Args:
        module: a model or a part of it.
        names: which adapters; None: those that act.

    Raises:
        ConfigError: if there is none of a name, or merging it would change an output: a bottleneck and virtual tokens
            are not linear in the input, a DoRA that stays reads the weight, gains scale what stays. Nothing has been
            changed then.
    """
    wanted = None if names is None else set(names)
    for name in sorted(wanted or ()):
        if name not in adapter_names(module):
            raise ConfigError(unknown("adapter", name, adapter_names(module)))
    plan = {
        path: [name for name in layer.adapters if name in (layer.active if wanted is None else wanted)]
        for path, layer in adapted_modules(module)
    }
    return merge_layers(module, plan)


@torch.no_grad()
def merge_layers(module: nn.Module, plan: Mapping[str, Sequence[str]]) -> Merged:
    """Like :func:`merge_adapters` with other names for each layer.

    Args:
        module: a model or a part of it.
        plan: path of a layer -> names of its adapters to merge.
    """
    check_merge(module, plan)
    merged = Merged()
    layers = dict(adapted_modules(module))
    for path, names in plan.items():
        if names:
            merged._records.append(_merge(layers[path], names))
            merged.layers.append(path)
    return merged


def check_merge(module: nn.Module, plan: Mapping[str, Sequence[str]]) -> None:
    """Prove that a plan can be merged; see :func:`merge_adapters`.

    Raises:
        ConfigError: if it would change an output.
    """
    for path, layer in adapted_modules(module):
        if plan.get(path):
            _refuse(path, layer, plan[path])


def _refuse(path: str, layer: Adapted, chosen: Collection[str]) -> None:
    where = f"merge: {path or 'the layer'}"
    for name in chosen:
        config = layer.adapters[name].config
        if not config.is_mergeable:  # type: ignore[union-attr]
            raise ConfigError(
                f"{where}: the adapter {name!r} is a {config.use!r}, which no weight can stand in for; "  # type: ignore[union-attr]
                "leave it unmerged (merge: false in a recipe)"
            )
    weight = layer.weight
    if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter):
        raise ConfigError(f"{where}: its weight is stored as {type(weight).__name__}; merge before quantising")
    rest = [name for name in layer.active if name not in chosen]
    for name in rest:
        adapter = layer.adapters[name]
        if isinstance(adapter, DoRA) or any(isinstance(layer.adapters[own], IA3) for own in chosen):
            if isinstance(adapter, IA3):
                continue
            raise ConfigError(
                f"{where}: merging {', '.join(chosen)} would change what {name!r} does, which stays; merge them "
                "together"
            )


def _merge(layer: Adapted, chosen: Collection[str]) -> _Record:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, nn.Parameter)
    exact = torch.promote_types(weight.dtype, torch.float32)
    old = weight.to(exact)
    new = old.clone()
    adapters: list[Adapter] = [layer.adapters[name] for name in chosen]  # type: ignore[misc]
    for adapter in adapters:
        update = adapter.merged(old)
        new = new if update is None else new + update
    gain_O: Tensor | None = None
    for adapter in adapters:
        on_inputs, on_outputs = adapter.gains()
        if on_inputs is not None:
            new = new * on_inputs.to(exact)
        if on_outputs is not None:
            new = new * on_outputs.to(exact)[:, None]
            gain_O = on_outputs.to(exact) if gain_O is None else gain_O * on_outputs.to(exact)
    layer.weight = nn.Parameter(new.to(weight.dtype), requires_grad=weight.requires_grad)
    if bias is not None and gain_O is not None:
        layer.bias = nn.Parameter((bias.to(exact) * gain_O).to(bias.dtype), requires_grad=bias.requires_grad)
    active = layer.active
    return _Record(layer, weight, bias, detach(layer, chosen), active)
