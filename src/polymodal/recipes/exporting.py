"""Export: a model as a checkpoint folder of a published architecture.

The layout is the first whose configs, read back, give the model again; those that its parts came from are tried first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.base import EncoderConfig
from polymodal.models.layers import TransformerConfig
from polymodal.models.presets import ARCHITECTURES, Architecture, Vocabulary
from polymodal.models.weights import HubConfigs, HubFolder
from polymodal.models.weights.assign import no_weights, wanted_names
from polymodal.models.weights.folder import check_new
from polymodal.recipes.published import Published, find_folder
from polymodal.recipes.schema import PartSource


def export_hub(
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    out: Path,
    name: str | None = None,
    sources: Mapping[str, PartSource] | None = None,
) -> str:
    """Write a model as a checkpoint folder of its published architecture, in the number format that it has.

    Args:
        model: the model's config.
        tensors: its state dict, shared tensors under their first name only.
        vocabulary: of its tokenizer.
        out: a new or empty folder.
        name: the architecture; None takes the first whose configs read back to this model, beginning with those of the
            sources.
        sources: checkpoints that the model's parts came from, by path; weights that the published model has and ours
            does not need (blocks after the one whose features are read) are taken from them. What no source holds
            stays out: the reference library draws it anew, and its answers do not depend on it.

    Returns:
        The architecture's name.

    Raises:
        ConfigError: if no published architecture is this model, saying why for each that was tried.
        CheckpointError: if ``out`` is not empty.
    """
    from safetensors.torch import save_file

    check_new(out)
    sources = sources or {}
    known = [source.architecture for source in sources.values() if source.architecture in ARCHITECTURES]
    chosen, files = hub_files(model, vocabulary, dict.fromkeys([name] if name else [*known, *ARCHITECTURES]))
    architecture = ARCHITECTURES[chosen]
    table = architecture.names(model, ())
    stored = table.save(tensors, f"export as {chosen}")
    for folder in dict.fromkeys(source.folder for source in sources.values()):
        theirs = HubFolder(find_folder(folder)).tensors
        stored.update({key: theirs[key] for key in theirs if key not in stored and table.is_unused(key)})
    for path, source in sources.items():
        beyond = _beyond(model, architecture, path, source)
        stored.update({key: value for key, value in beyond.items() if key not in stored})
    _say_format(files[architecture.config_file], tensors.values())
    out.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (out / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    contiguous = {key: value.detach().cpu().contiguous() for key, value in stored.items()}
    save_file(contiguous, out / architecture.weights_file, metadata={"format": "pt"})
    return chosen


def _beyond(model: ModelConfig, architecture: Architecture, path: str, source: PartSource) -> dict[str, Tensor]:
    """What a tower of another layout holds beyond the layer that ours reads, by the names of this layout."""
    stream = model.streams[path.split(".")[1]] if path.endswith(".encoder") else None
    if stream is None or getattr(stream.encoder, "layer", -1) == -1 or source.architecture not in ARCHITECTURES:
        return {}
    published = Published(source.folder)
    encoder = published.config(source.part)
    assert isinstance(encoder, EncoderConfig)
    uncut = encoder.model_copy(update={"layer": -1})
    with no_weights():
        names = wanted_names(uncut.build())
    theirs = published.architecture.names(_with(published.model, source.part, uncut), list(published.folder.tensors))
    ours, unused = architecture.names(_with(model, path, uncut), ()), architecture.names(model, ()).is_unused
    beyond = [name for name in names if (place := ours.find(f"{path}.{name}")) and unused(place[1])]
    found = theirs.load([f"{source.part}.{name}" for name in beyond], published.folder.tensors, source.folder)
    return ours.save({path + name[len(source.part) :]: tensor for name, tensor in found.items()}, path)


def _with(model: ModelConfig, path: str, encoder: EncoderConfig) -> ModelConfig:
    """A model with another encoder at ``streams.NAME.encoder``."""
    name = path.split(".")[1]
    stream = model.streams[name].model_copy(update={"encoder": encoder})
    return model.model_copy(update={"streams": {**model.streams, name: stream}})


def _say_format(config: dict[str, Any], tensors: Iterable[Tensor]) -> None:
    """Name the number format as the reference library does, for readers that go by the config."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    if "model_type" in config and sizes:
        config["dtype"] = str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def hub_files(
    model: ModelConfig, vocabulary: Vocabulary, candidates: Iterable[str]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The first architecture that says everything about a model, and its JSON files by name."""
    reasons = []
    for candidate in candidates:
        if candidate not in ARCHITECTURES:
            raise ConfigError(f"export: unknown architecture {candidate!r}; expected one of {sorted(ARCHITECTURES)}")
        try:
            files = ARCHITECTURES[candidate].to_hub(model, vocabulary)
            difference = _difference(model, ARCHITECTURES[candidate], files)
        except ConfigError as error:
            reasons.append(str(error))
            continue
        if not difference:
            return candidate, files
        reasons.append(f"{candidate}: cannot say {difference}")
    raise ConfigError("export: no published layout holds this model:\n  " + "\n  ".join(reasons))


def _difference(model: ModelConfig, architecture: Architecture, files: Mapping[str, dict[str, Any]]) -> str:
    """What is lost when the exported configs are read again; "" if nothing is."""
    again = architecture.model(
        HubConfigs(
            files[architecture.config_file],
            files.get("preprocessor_config.json", {}),
            files.get("processor_config.json", {}),
            files.get("generation_config.json", {}),
            files.get("tokenizer_config.json", {}),
            files.get("vocab.json", {}),
        )
    )
    return next(_differing(model.to_data(), again.to_data(), "model"), "")


def _differing(ours: Any, again: Any, path: str) -> Iterator[str]:
    if path == "model.tokenizer" or path.endswith((".reader.tokenizer", ".encoder.vocab_size")):
        return  # the tokenizer's affair
    if path in ("model.backbone.chat", "model.backbone.stop_ids"):
        return  # the chat template's and the generation config's
    if path.endswith(".transformer") and isinstance(ours, dict) and isinstance(again, dict):
        ours, again = (TransformerConfig.parse(stack).resolved().to_data() for stack in (ours, again))
    if isinstance(ours, dict) and isinstance(again, dict):
        for key in sorted(ours.keys() | again.keys()):
            yield from _differing(ours.get(key), again.get(key), f"{path}.{key}")
    elif ours != again:
        yield f"{path}: {ours!r} (reads back as {again!r})"
