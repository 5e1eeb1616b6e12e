"""What trains and what stays: selection by name, proof by hash, and the report of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator
from torch import nn

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.core.patterns import match_names
from polymodal.models.adapters import (
    ADAPTERS,
    DEFAULT,
    adapted_modules,
    adapter_parameters,
    apply_adapter,
    check_merge,
    merge_layers,
)
from polymodal.training.state_files import hash_tensors


class TrainEntry(Config):
    """One entry of a stage's ``train``: a path or pattern, and an adapter where only that trains.

    Args:
        part: an exact dotted path of a module or parameter, or a pattern with ``*``.
        adapter: None: the part's own parameters train.
        name: of the adapter; adapters of several names may stand on one layer, and all of them act.
        merge: whether the adapter is merged into the weights when the stage ends, or stays. None: merged where that
            changes no output.
    """

    part: str
    adapter: ADAPTERS.field() | None = None  # type: ignore[valid-type]
    name: str = DEFAULT
    merge: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> TrainEntry:
        if self.adapter is None and (self.name != DEFAULT or self.merge is not None):
            raise ValueError("'name' and 'merge' belong to an adapter; say which, or leave them out")
        if self.merge and self.adapter is not None and not self.adapter.is_mergeable:
            raise ValueError(
                f"merge: no weight can stand in for a {self.adapter.use!r}; it stays beside the weights, merge: false"
            )
        return self

    @property
    def is_merged(self) -> bool:
        """Whether its adapter is gone after the stage."""
        if self.adapter is None:
            return False
        return bool(self.adapter.is_mergeable) if self.merge is None else self.merge


def parse_train(entries: Sequence[Any], where: str = "train") -> list[TrainEntry]:
    """Read a stage's ``train`` list; a bare string stands for ``{part: string}``.

    Raises:
        ConfigError: if it is empty or an entry is malformed.
    """
    if isinstance(entries, str) or not entries:
        raise ConfigError(f"{where}: found {entries!r}, expected a list of at least one module path")
    return [
        TrainEntry.parse({"part": entry} if isinstance(entry, str) else entry, f"{where}[{index}]")
        for index, entry in enumerate(entries)
    ]


def select(model: nn.Module, patterns: Iterable[str], where: str = "train") -> set[str]:
    """The names of the parameters that ``patterns`` select, with every alias of a tied one.

    Raises:
        ConfigError: if a pattern matches nothing, or only modules without parameters; names the nearest paths.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = {name: None for name, _ in model.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for pattern in patterns:
        names = match_names(pattern, [*parameters, *modules], "parameter or module", where)
        found = [name for name in names if name in parameters]
        if not found:
            raise ConfigError(f"{where}: {pattern!r} has no parameters to train; remove it from the list")
        chosen.update(found)
    tensors = {id(parameters[name]) for name in chosen}
    return {name for name, parameter in parameters.items() if id(parameter) in tensors}


def apply_train(model: nn.Module, entries: Sequence[TrainEntry], where: str = "train") -> set[str]:
    """Add the adapters that ``entries`` ask for, and set ``requires_grad`` of every parameter.

    Call it before weights that hold adapters are loaded, and before the optimizer is built.

    Returns:
        The names of the trained parameters.

    Raises:
        ConfigError: if an entry or an adapter's pattern matches nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    trained: set[str] = set()
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        if entry.adapter is None:
            trained |= select(model, [entry.part], place)
            continue
        for part in adapted_parts(model, entry, place):
            adapted = apply_adapter(modules[part], entry.adapter, entry.name, f"{place}.adapter")
            layers = [f"{part}.{name}" if name else part for name in adapted]
            if entry.is_merged:
                _refuse_tied(model, layers, place)
            owned = tuple(f"{layer}.adapters.{entry.name}." for layer in layers)
            trained.update(name for name in adapter_parameters(model) if name.startswith(owned))
    check_merge(model, _merge_plan(model, entries, where))
    set_trained(model, trained)
    return trained


def adapted_parts(model: nn.Module, entry: TrainEntry, where: str) -> list[str]:
    """Paths of the parts that an entry's adapter stands on."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return _outermost(match_names(entry.part, names, "module", where))


def finish_train(model: nn.Module, entries: Sequence[TrainEntry], where: str = "train") -> None:
    """Merge the adapters of a stage that are to be merged; the others stay, and act from now on."""
    merge_layers(model, _merge_plan(model, entries, where))


def _merge_plan(model: nn.Module, entries: Sequence[TrainEntry], where: str) -> dict[str, list[str]]:
    """Per adapted layer, the names of the adapters that the stage merges."""
    plan: dict[str, list[str]] = {}
    for index, entry in enumerate(entries):
        for part in adapted_parts(model, entry, f"{where}[{index}]") if entry.is_merged else ():
            for path, layer in adapted_modules(model):
                if entry.name in layer.adapters and (path == part or path.startswith(part + ".")):
                    plan.setdefault(path, []).append(entry.name)
    return plan


def keep_adapters(model: nn.Module, stages: Iterable[tuple[str, Sequence[TrainEntry]]]) -> None:
    """Give a new model the adapters that stayed after its stages, so that its weights can be loaded.

    Args:
        model: as its config builds it.
        stages: name and ``train`` of each, in order.
    """
    for stage, entries in stages:
        kept = [entry for entry in entries if entry.adapter is not None and not entry.is_merged]
        if kept:
            apply_train(model, kept, f"stages.{stage}.train")


def _refuse_tied(model: nn.Module, layers: Sequence[str], where: str) -> None:
    """An adapter would part a tied weight when it is merged, and the file of the merged model could not be loaded."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        weight = f"{layer}.weight"
        others = [name for name in owners[id(model.get_parameter(weight))] if name != weight]
        if others:
            raise ConfigError(
                f"{where}: the weight of {layer} is tied to {others[0]}, and an adapter would part them; expected a "
                "weight of its own: set tied: false, leave the layer out, or keep the adapter beside it, merge: false"
            )


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(other + ".") for other in kept):
            kept.append(path)
    return kept


def set_trained(model: nn.Module, names: set[str]) -> None:
    """Set ``requires_grad`` to True for the parameters in ``names`` and to False for all others."""
    named = list(model.named_parameters(remove_duplicate=False))
    tensors = {id(parameter) for name, parameter in named if name in names}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in tensors)


def set_modes(model: nn.Module) -> None:
    """Training mode for what trains, evaluation mode (no dropout, no new batch statistics) for what is frozen.

    A module all of whose parameters are frozen is in evaluation mode with everything below it; a module without
    parameters follows the module it stands in.
    """
    model.train()
    frozen = [m for m in model.modules() if _all_frozen(m)]
    for module in frozen:
        module.eval()


def _all_frozen(module: nn.Module) -> bool:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and not any(flags)


def frozen_names(model: nn.Module) -> set[str]:
    """Names in the state dict that a stage must leave as they are.

    Every parameter without ``requires_grad``, and the buffers of modules all of whose parameters are frozen.
    """
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    state = model.state_dict().keys()
    for path, module in model.named_modules(remove_duplicate=False):
        if _all_frozen(module):
            prefix = f"{path}." if path else ""
            names.update(prefix + name for name, _ in module.named_buffers() if prefix + name in state)
    return names


def fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """SHA-256 in hex over the names, types, shapes and bytes of the given entries of the state dict.

    Raises:
        KeyError: if a name is not in the state dict.
    """
    state = model.state_dict()
    return hash_tensors({name: state[name] for name in names})


@dataclass(frozen=True, slots=True)
class TrainRow:
    """Parameters of one part of the model; a tied tensor counts once, where it is named first."""

    part: str
    trained: int
    frozen: int
    adapters: int
    """How many of the trained ones belong to adapters."""


def train_report(model: nn.Module) -> list[TrainRow]:
    """One row per top part: a child of the model, or, below a ModuleDict, ``dict.key.child``."""
    counts: dict[str, list[int]] = {}
    adapters = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        row = counts.setdefault(_part_of(model, name), [0, 0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
        row[2] += parameter.numel() if parameter.requires_grad and name in adapters else 0
    return [TrainRow(part, *row) for part, row in counts.items()]


def _part_of(model: nn.Module, name: str) -> str:
    steps = name.split(".")
    is_dict = isinstance(getattr(model, steps[0]), nn.ModuleDict)
    return ".".join(steps[: min(3, len(steps) - 1)]) if is_dict else steps[0]
