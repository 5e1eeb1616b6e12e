"""Export: a model as a checkpoint folder of a published architecture.

The layout is the first whose configs, read back, give the model again; those that its parts came from are tried first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.layers import TransformerConfig
from polymodal.models.presets import ARCHITECTURES, Architecture, Vocabulary
from polymodal.models.weights import HubConfigs, HubFolder
from polymodal.recipes.published import find_folder
from polymodal.recipes.schema import PartSource


def export_hub(
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    out: Path,
    name: str | None = None,
    sources: Collection[PartSource] = (),
) -> str:
    """Write a model as a checkpoint folder of its published architecture, in the number format that it has.

    Args:
        model: the model's config.
        tensors: its state dict, shared tensors under their first name only.
        vocabulary: of its tokenizer.
        out: a new or empty folder.
        name: the architecture; None takes the first whose configs read back to this model, beginning with those of the
            sources.
        sources: checkpoints that the model's parts came from; weights that the published model has and ours does not
            need (blocks after the one whose features are read) are taken from them.

    Returns:
        The architecture's name.

    Raises:
        ConfigError: if no published architecture is this model, saying why for each that was tried.
        CheckpointError: if ``out`` is not empty.
    """
    from safetensors.torch import save_file

    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: is not empty; choose a new folder")
    known = [source.architecture for source in sources if source.architecture in ARCHITECTURES]
    chosen, files = hub_files(model, vocabulary, dict.fromkeys([name] if name else [*known, *ARCHITECTURES]))
    architecture = ARCHITECTURES[chosen]
    table = architecture.names(model, ())
    stored = table.save(tensors, f"export as {chosen}")
    for folder in dict.fromkeys(source.folder for source in sources):
        theirs = HubFolder(find_folder(folder)).tensors
        stored.update({key: theirs[key] for key in theirs if key not in stored and table.is_unused(key)})
    _say_format(files[architecture.config_file], tensors.values())
    out.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (out / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    contiguous = {key: value.detach().cpu().contiguous() for key, value in stored.items()}
    save_file(contiguous, out / architecture.weights_file, metadata={"format": "pt"})
    return chosen


def _say_format(config: dict[str, Any], tensors: Iterable[Tensor]) -> None:
    """Name the number format as the reference library does, for readers that go by the config."""
    formats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if "model_type" in config and len(formats) == 1:
        config["dtype"] = str(formats.pop()).removeprefix("torch.")


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
