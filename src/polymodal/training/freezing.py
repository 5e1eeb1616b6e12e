"""What trains and what stays: selection by name, proof by hash, and the report of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import field_validator
from torch import nn

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError
from polymodal.core.patterns import match_names
from polymodal.models.adapters import ADAPTERS, LoRAConfig, apply_lora, is_adapter
from polymodal.training.state_files import hash_tensors


class TrainEntry(Config):
    """One entry of a stage's ``train``: a path or pattern, and an adapter where only that trains.

    Args:
        part: an exact dotted path of a module or parameter, or a pattern with ``*``.
        adapter: None: the part's own parameters train.
    """

    part: str
    adapter: LoRAConfig | None = None

    @field_validator("adapter", mode="before")
    @classmethod
    def _from_table(cls, value: Any) -> Any:
        return None if value is None else ADAPTERS.parse(value)


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
        parts = match_names(entry.part, [name for name in modules if name], "module", place)
        for part in _outermost(parts):
            adapted = apply_lora(modules[part], entry.adapter, f"{place}.adapter")
            layers = [f"{part}.{name}" if name else part for name in adapted]
            _refuse_tied(model, layers, place)
            trained.update(f"{layer}.{leaf}" for layer in layers for leaf in ("lora_a", "lora_b"))
    set_trained(model, trained)
    return trained


def _refuse_tied(model: nn.Module, layers: Sequence[str], where: str) -> None:
    """An adapter would part a tied weight when it is merged, and the file of the merged model could not be loaded."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        others = [name for name in owners[id(model.get_parameter(f"{layer}.weight"))] if name != f"{layer}.weight"]
        if others:
            raise ConfigError(
                f"{where}: the weight of {layer} is tied to {others[0]}, and an adapter would part them; expected a "
                "weight of its own: set tied: false, or leave the layer out"
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
    for name, parameter in model.named_parameters():
        row = counts.setdefault(_part_of(model, name), [0, 0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
        row[2] += parameter.numel() if parameter.requires_grad and is_adapter(name) else 0
    return [TrainRow(part, *row) for part, row in counts.items()]


def _part_of(model: nn.Module, name: str) -> str:
    steps = name.split(".")
    is_dict = isinstance(getattr(model, steps[0]), nn.ModuleDict)
    return ".".join(steps[: min(3, len(steps) - 1)]) if is_dict else steps[0]
