"""Putting adapters on a part of a model, and choosing which of them act."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.core.patterns import match_names
from polymodal.models.adapters.base import DEFAULT, Adapted, AdapterConfig, adapted_modules, attach
from polymodal.models.adapters.bottleneck import BottleneckConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def apply_adapter(module: nn.Module, config: AdapterConfig, name: str = DEFAULT, where: str = "adapter") -> list[str]:
    """Give the modules of ``module`` that ``config`` selects an adapter, and freeze all else in it.

    Applying the same config under the same name again changes nothing, so that a later stage may go on with it; under
    another name the modules get a second adapter, and both act.

    Args:
        module: the part to adapt; changed in place.
        config: which modules and how.
        name: of the adapter.
        where: the place in the recipe, for messages.

    Returns:
        The paths of the adapted modules within ``module``, in module order.

    Raises:
        ConfigError: if a pattern selects nothing, or a module has an adapter of that name and another shape already.
    """
    check_name(name, where)
    modules = dict(module.named_modules())
    chosen = select_targets(modules, config, where)
    for path in chosen:
        _refuse_other(modules[path], path, config, name, where)
    for path in chosen:
        target = modules[path]
        if not (isinstance(target, Adapted) and name in target.adapters):
            attach(target, name, config.build(target, path))
    trained = {id(p) for path in chosen for p in modules[path].adapters[name].parameters()}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return chosen


def check_name(name: str, where: str) -> None:
    """Prove that an adapter may be called ``name``.

    Raises:
        ConfigError: if it may not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: found the adapter name {name!r}, expected letters, digits, '_' and '-'")


def select_targets(modules: dict[str, nn.Module], config: AdapterConfig, where: str) -> list[str]:
    """The paths that a config's patterns choose, in module order.

    Raises:
        ConfigError: if a pattern chooses nothing.
    """
    chosen: set[str] = set()
    for field, pattern in config.targets:
        offers = [path for path, inner in modules.items() if config.fits(inner, field)]
        found = match_names(pattern, offers, _noun(config, field), f"{where}.{field}")
        # A pattern that names an attention layer also fits its projections; the sublayer is meant.
        chosen.update(_outermost(found) if isinstance(config, BottleneckConfig) else found)
    return [path for path in modules if path in chosen]


def _noun(config: AdapterConfig, field: str) -> str:
    return "embedding" if field == "embeddings" else config.noun


def _outermost(paths: Sequence[str]) -> list[str]:
    def is_inside(path: str) -> bool:
        return any(other == "" or path.startswith(other + ".") for other in paths if other != path)

    return [path for path in paths if not is_inside(path)]


def _refuse_other(module: nn.Module, path: str, config: AdapterConfig, name: str, where: str) -> None:
    if not (isinstance(module, Adapted) and name in module.adapters):
        return
    old = module.adapters[name].config
    if not config.same_shape(old):  # type: ignore[arg-type]
        raise ConfigError(
            f"{where}: {path or 'the layer'} has an adapter {name!r} of other settings from an earlier stage, "
            f"{_settings(old)}; expected the same, not {_settings(config)}; merge it first, keep its settings, or give "
            "the new one another name"
        )


def _settings(config: object) -> str:
    assert isinstance(config, AdapterConfig)
    data = {key: value for key, value in config.to_data().items() if key not in ("match", "embeddings", "inputs")}
    return ", ".join(f"{key} {value}" for key, value in data.items())


def adapter_names(module: nn.Module) -> list[str]:
    """The names of all adapters in a module, in the order of their first place."""
    return list(dict.fromkeys(name for _, inner in adapted_modules(module) for name in inner.adapters))


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters by their path."""
    found = {}
    for path, inner in adapted_modules(module):
        prefix = f"{path}.adapters." if path else "adapters."
        found.update({prefix + name: parameter for name, parameter in inner.adapters.named_parameters()})
    return found


def asleep_parameters(module: nn.Module) -> set[str]:
    """Paths of the parameters that cannot get a gradient before what they multiply has left zero."""
    found: set[str] = set()
    for path, inner in adapted_modules(module):
        for name, adapter in inner.adapters.items():
            found.update(".".join(filter(None, (path, "adapters", name, leaf))) for leaf in adapter.asleep)  # type: ignore[union-attr]
    return found


def use_adapters(module: nn.Module, names: Iterable[str]) -> None:
    """Let exactly the named adapters act, wherever in the module they are; none: the model as it is without.

    Raises:
        ConfigError: if there is no adapter of a name.
    """
    names = tuple(names)
    known = adapter_names(module)
    for name in names:
        if name not in known:
            raise ConfigError(unknown("adapter", name, known) if known else f"the model has no adapters, not {name!r}")
    for _, inner in adapted_modules(module):
        inner.active = tuple(name for name in inner.adapters if name in names)
