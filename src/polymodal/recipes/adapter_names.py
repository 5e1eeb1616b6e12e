"""Where the modules of a model stand in the hub's names, for adapters that travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.models.adapters.base import plain
from polymodal.models.presets import ARCHITECTURES, Vocabulary
from polymodal.models.weights import NameTable
from polymodal.models.weights.names import SAME, Same, Slice, Transposed
from polymodal.recipes.exporting import hub_files
from polymodal.recipes.published import Published
from polymodal.recipes.schema import Recipe

PREFIX = "base_model.model."
"""What the hub's adapter files put before every module's name."""


@dataclass(frozen=True, slots=True)
class Place:
    """One of our layers within a module of the hub.

    Args:
        layer: its path in our model.
        module: the hub's name of the module.
        index: which of the equal parts of the module's outputs it is; of: how many there are.
        is_transposed: whether the hub stores ``[inputs, outputs]``.
    """

    layer: str
    module: str
    index: int = 0
    of: int = 1
    is_transposed: bool = False


@dataclass(slots=True)
class HubNames:
    """All layers of a model that an adapter may stand on, by both names.

    Args:
        base: what the base model is called: the folder that its weights came from; None without one.
    """

    base: str | None = None
    by_layer: dict[str, Place] = field(default_factory=dict)
    by_module: dict[str, dict[int, Place]] = field(default_factory=dict)

    def add(self, place: Place) -> None:
        """Take one in."""
        self.by_layer[place.layer] = place
        self.by_module.setdefault(place.module, {})[place.index] = place

    def module(self, name: str) -> dict[int, Place] | None:
        """Our layers of a hub module; also where the file counts from another class (``model.`` more or less)."""
        if name in self.by_module:
            return self.by_module[name]
        near = [own for own in self.by_module if own.endswith("." + name) or name.endswith("." + own)]
        return self.by_module[near[0]] if len(near) == 1 else None


def hub_names(recipe: Recipe, network: nn.Module) -> HubNames:
    """The names of a model's layers on the hub.

    They are those of the checkpoint that a layer came from, or of the published layout that holds this model; our own
    where there is neither.

    Args:
        recipe: of the model.
        network: its modules.
    """
    tables = _tables(recipe)
    sources = {source.folder for source in recipe.sources.values()}
    names = HubNames(next(iter(sources)) if len(sources) == 1 else None)
    for path, module in network.named_modules():
        if plain(module) in (nn.Linear, nn.Embedding):
            names.add(_place(path, tables))
    return names


def _tables(recipe: Recipe) -> dict[str, tuple[str, NameTable]]:
    """Part of our model -> (its path in the checkpoint's model, table)."""
    found: dict[str, tuple[str, NameTable]] = {}
    for path, source in recipe.sources.items():
        if source.part or not path:
            published = Published(source.folder)
            table = published.architecture.names(published.model, list(published.folder.tensors))
            found[path] = (source.part, table)
    if recipe.sources:
        return found
    try:
        chosen, _ = hub_files(recipe.model, Vocabulary(recipe.model.tokenizer.vocab_size), ARCHITECTURES)
    except ConfigError:
        return {}
    return {"": ("", ARCHITECTURES[chosen].names(recipe.model, ()))}


def _place(layer: str, tables: Mapping[str, tuple[str, NameTable]]) -> Place:
    for part, (theirs, table) in tables.items():
        if part and not (layer == part or layer.startswith(part + ".")):
            continue
        found = table.find(f"{theirs}{layer[len(part) :]}.weight")
        if found is not None and found[1].endswith(".weight"):
            change, module = found[0].change, found[1].removesuffix(".weight")
            if change == SAME or isinstance(change, Same):
                return Place(layer, module)
            if isinstance(change, Transposed):
                return Place(layer, module, is_transposed=True)
            if isinstance(change, Slice) and change.dim == 0:
                return Place(layer, module, change.index, change.of, change.transposed)
    return Place(layer, layer)


def pieces_of(names: HubNames, layers: Iterator[str]) -> dict[str, dict[int, str]]:
    """Hub module -> index -> our layer, of the given layers, in order."""
    grouped: dict[str, dict[int, str]] = {}
    for layer in layers:
        place = names.by_layer[layer]
        grouped.setdefault(place.module, {})[place.index] = layer
    return grouped
