"""Published checkpoints: whole models from a folder, and parts of recipes ``from`` a folder.

A recipe takes any part of any checkpoint by naming the folder where the part's config would stand::

    streams:
      image: {modality: image, encoder: {from: openai/clip-vit-large-patch14-336, layer: -2}, ...}
    backbone: {from: lmsys/vicuna-7b-v1.5}

The part's config is filled in from the checkpoint, other keys beside ``from`` override it, and the recipe remembers the
source of its weights in ``sources``.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from polymodal.core.config import Config, unknown
from polymodal.core.errors import CheckpointError, ConfigError, MissingExtraError
from polymodal.models.backbones.transformers_decoder import TransformersDecoder
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.transformers_encoder import TransformersEncoder
from polymodal.models.presets import ARCHITECTURES, Architecture, find_architecture, find_size
from polymodal.models.presets.unread import unread_keys
from polymodal.models.weights import HubConfigs, HubFolder
from polymodal.models.weights.assign import assign, materialise, wanted_names, without_memory
from polymodal.recipes.adapted import adapt, is_adapted
from polymodal.recipes.schema import PartSource

_LOG = logging.getLogger(__name__)


class Published:
    """A checkpoint folder read as a model of ours.

    Args:
        source: a folder, or a hub id, which is fetched.

    Raises:
        CheckpointError: if there is no such folder, or its files are damaged.
        ConfigError: if its architecture has no native form.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.folder = HubFolder(find_folder(source))
        self.architecture: Architecture = find_architecture(self.folder.configs)
        self.model: ModelConfig = self.architecture.model(self.folder.configs)
        _warn_of_unread(str(self.folder.path), self.architecture.name, self.folder.configs)

    def part(self, path: str, role: str, modality: str | None = None) -> str:
        """The checkpoint's part that fits a place of a recipe: the same path, or the only one of its role.

        Args:
            path: the place.
            role: ``encoder``, ``connector``, ``backbone`` or ``heads``.
            modality: of the stream there, if it says so: parts of other streams are left out.

        Raises:
            ConfigError: if there is none, or several.
        """
        offers = list(_parts(self.model))
        if path in offers:
            return path
        fitting = [name for name in offers if role in (name.split(".")[-1], name.split(".")[0])]
        if modality is not None:
            streams = self.model.streams
            fitting = [name for name in fitting if streams[name.split(".")[1]].modality == modality]
        if len(fitting) != 1:
            kind = f"{role} for {modality}" if modality else role
            raise ConfigError(
                f"{path}: found {' and '.join(fitting) or f'no {kind}'} in {self.folder.path}, expected one {kind}; "
                f"its parts: {', '.join(offers)}. Name one: from: {{folder: ..., part: ...}}"
            )
        return fitting[0]

    def config(self, part: str) -> Config:
        """The config of one part.

        Raises:
            ConfigError: if there is no such part.
        """
        offers = list(_parts(self.model))
        if part not in offers:
            raise ConfigError(f"{self.folder.path}: {unknown('part', part, offers)}")
        value: Any = self.model
        for key in part.split("."):
            value = value[key] if isinstance(value, Mapping) else getattr(value, key)
        assert isinstance(value, Config)
        return value

    def fill(self, network: nn.Module, at: str = "", part: str = "", without: Collection[str] = ()) -> None:
        """Put the checkpoint's weights into ``network``, without a copy.

        Args:
            network: whose names below ``at`` are those of the checkpoint's model below ``part``.
            at: path of the part in the network; "" for all of it.
            part: its path in the checkpoint's model.
            without: paths in the network that are not the checkpoint's, and keep what they have.

        Raises:
            CheckpointError: if a tensor is missing, has another shape, or (for a whole model) is not known.
        """
        stored, where = self.folder.tensors, str(self.folder.path)
        table = self.architecture.names(self.model, list(stored))
        new = [name for path in without for name in network.state_dict() if _below(name, path)]
        own = {part + n[len(at) :]: n for n in wanted_names(network) if _below(n, at) and n not in new}
        loaded = table.load(own, stored, where)
        if not at:
            strange = table.unknown(network.state_dict(), list(stored))
            if strange:
                more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
                raise CheckpointError(
                    f"{where}: {len(strange)} tensor(s) unknown to {self.architecture.name}: "
                    f"{', '.join(strange[:6])}{more}; the file is of another architecture than config.json names"
                )
        assign(network, {own[name]: tensor for name, tensor in loaded.items()}, where)
        absent = [name for name in without_memory(network) if _below(name, at)]
        materialise(network, absent)

    def exact_names(self, network: nn.Module) -> list[str]:
        """Parameters of the whole model that stay float32 where the others are float16."""
        kept = {*self.architecture.float32}
        table = self.architecture.names(self.model, list(self.folder.tensors)) if kept else None
        places = {name: table.find(name) for name in wanted_names(network)} if table else {}
        # The code that BLIP-2 was published with writes 'Qformer' where the library writes 'qformer'.
        return [name for name, place in places.items() if place is not None and kept & {*place[1].lower().split(".")}]


def _warn_of_unread(folder: str, name: str, configs: HubConfigs) -> None:
    """Say once of a folder which keys of its config nobody reads."""
    keys = unread_keys(ARCHITECTURES[name], configs)
    if keys:
        _warn_once(
            f"{folder}/config.json: found {', '.join(keys)}, which {name} does not read, expected keys that it reads "
            "or that change nothing. Where one changes what is computed, answers differ from the reference library's: "
            "compare them, or take the model as a part, {use: transformers, from: FOLDER}"
        )


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    _LOG.warning(message)


def _below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(path + ".")


def _parts(model: ModelConfig) -> Iterator[str]:
    for name, stream in model.streams.items():
        yield f"streams.{name}.encoder"
        if stream.connector is not None:
            yield f"streams.{name}.connector"
    if model.backbone.use != "none":
        yield "backbone"
    yield from (f"heads.{name}" for name in model.heads)


def published_recipe(name: str) -> dict[str, Any]:
    """The recipe of a published size, with random weights and no stages: a start to edit.

    Args:
        name: one of :func:`polymodal.models.presets.published_names`.

    Raises:
        ConfigError: if there is none of that name.
    """
    architecture, size = find_size(name)
    model = architecture.model(HubConfigs(size.config, size.preprocessor))
    return {"name": name, "model": model.to_data()}


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The local folder of a source: itself, or the hub's snapshot of that id.

    Raises:
        CheckpointError: if it is neither, or cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return path
    name = os.fspath(source)
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise CheckpointError(
            f"{name}: there is no such folder; expected one, or a hub id such as openai/clip-vit-base"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub", f"fetching {name}") from None
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # noqa: BLE001  (network, permission and naming errors of many kinds)
        raise CheckpointError(f"{name}: is no folder here and could not be fetched: {error}") from None


def resolve(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with every ``from`` replaced by the config it stands for; ``sources`` remembers them.

    Raises:
        ConfigError: if a part is not in the checkpoint, or contradicts it.
        CheckpointError: if a checkpoint cannot be read.
    """
    whole: dict[str, Any] = copy.deepcopy(dict(data))
    model = whole.get("model")
    if not isinstance(model, dict):
        return whole
    sources: dict[str, Any] = dict(whole.get("sources") or {})
    shelf = _Shelf()
    # A language model that is taken whole brings its own head.
    backbone = model.get("backbone")
    if isinstance(backbone, dict) and "from" in backbone and "heads" not in model and not is_adapted(backbone):
        model["heads"] = shelf.own_heads(_source(backbone["from"], "backbone")[0])
    for path, role, holder, key in list(_places(model)):
        value = holder[key]
        if not isinstance(value, dict) or "from" not in value:
            continue
        folder, part = _source(value.pop("from"), path)
        if is_adapted(value):
            adapt(value, role, holder, key, find_folder(folder))
            sources[path] = {"folder": folder, "part": ""}
            continue
        published = shelf[folder]
        is_streams = role in ("encoder", "connector")
        part = part or published.part(path, role, holder.get("modality") if is_streams else None)
        found = published.config(part).to_data()
        if value.get("use", found["use"]) != found["use"]:
            raise ConfigError(f"{path}: found use: {value['use']}, {folder} holds {found['use']!r}; leave 'use' out")
        holder[key] = _over(found, value)
        sources[path] = {"folder": folder, "part": part, "architecture": published.architecture.name}
        _fill_beside(published.model, part, role, holder if role == "encoder" else model)
    if sources:
        whole["sources"] = sources
    return whole


def _source(value: Any, path: str) -> tuple[str, str]:
    """Folder and part of what stands after ``from``; "" for a part that is not named.

    Raises:
        ConfigError: if it is neither a folder nor a mapping of ``folder`` and ``part``.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value), ""
    if not isinstance(value, Mapping) or "folder" not in value or not {*value} <= {"folder", "part"}:
        raise ConfigError(f"{path}.from: found {value!r}, expected a folder, a hub id or {{folder: ..., part: ...}}")
    return str(value["folder"]), str(value.get("part", ""))


def _over(found: Any, said: Any) -> Any:
    """``found`` with what the recipe says on top, key by key; another kind (``use``) replaces all of it."""
    if not isinstance(found, Mapping) or not isinstance(said, Mapping):
        return said
    if said.get("use", found.get("use")) != found.get("use"):
        return said
    return {**found, **{key: _over(found.get(key), value) for key, value in said.items()}}


def _fill_beside(theirs: ModelConfig, part: str, role: str, holder: dict[str, Any]) -> None:
    """What must go with a part, unless the recipe says otherwise: an encoder's reader, a backbone's tokenizer."""
    if role == "encoder":
        stream = theirs.streams[part.split(".")[1]]
        holder.setdefault("modality", stream.modality)
        if stream.reader is not None:
            holder.setdefault("reader", stream.reader.to_data())
    if role == "backbone":
        holder["tokenizer"] = _over(theirs.tokenizer.to_data(), holder.get("tokenizer", {}))


class _Shelf(dict[str, Published]):
    """Checkpoints by folder, each read once."""

    def __missing__(self, folder: str) -> Published:
        self[folder] = Published(folder)
        return self[folder]

    def own_heads(self, folder: str) -> dict[str, Any]:
        """The heads of a checkpoint's language model, as a recipe takes them."""
        heads = self[folder].model.heads
        own = [name for name, head in heads.items() if head.use == "next_token"]
        return {name: {"from": {"folder": folder, "part": f"heads.{name}"}} for name in own}


def _places(model: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(path, role, mapping, key) of everything in a model that may have a source."""
    for name, stream in (model.get("streams") or {}).items():
        if isinstance(stream, dict):
            for role in ("encoder", "connector"):
                if role in stream:
                    yield f"streams.{name}.{role}", role, stream, role
    if "backbone" in model:
        yield "backbone", "backbone", model, "backbone"
    heads = model.get("heads")
    if isinstance(heads, dict):
        for name in heads:
            yield f"heads.{name}", "heads", heads, name


_LOOKS = ("gated_cross", "cross_attention", "cross_norm")
"""Modules of a block that look at streams; new where the checkpoint's language model looks at none."""


def fill_sources(network: nn.Module, sources: Mapping[str, PartSource]) -> None:
    """Put the weights of every part that has a source into a new network.

    Raises:
        CheckpointError: if a source is gone, or does not hold what the part needs.
    """
    shelf = _Shelf()
    for path, source in sources.items():
        part: Any = network.get_submodule(path)
        if isinstance(part, TransformersEncoder | TransformersDecoder):
            part.load_folder(find_folder(source.folder))
            continue
        published = shelf[source.folder]
        is_new = path == "backbone" and published.model.look is None
        looks = [f"{path}.{name}" for name, _ in part.named_modules() if is_new and name.split(".")[-1] in _LOOKS]
        published.fill(network, path, source.part, without=looks)
