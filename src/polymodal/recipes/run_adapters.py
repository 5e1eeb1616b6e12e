"""What the adapters of a run learned, in the hub's layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from polymodal.core.errors import CheckpointError
from polymodal.models.adapters import adapter_parameters
from polymodal.recipes.adapters_hub import export_adapter
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run_folder import RECIPE, run_tokenizer
from polymodal.recipes.schema import Recipe
from polymodal.training.freezing import apply_train
from polymodal.training.state_files import read_tensors
from polymodal.training.weights import ADAPTERS_FILE


def export_run_adapters(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[Path]:
    """Write what the adapters of a run learned, also of those that were merged after their stage.

    One adapter goes into ``out`` itself, several into folders ``<stage>.<name>`` below it.

    Args:
        run: the folder of a run.
        out: a new or empty folder.

    Raises:
        CheckpointError: if the run has no adapters, or ``out`` is not empty.
    """
    folder, target = Path(run), Path(out)
    recipe = load_recipe(folder / RECIPE)
    found = list(_trained(recipe, folder).items())
    if not found:
        raise CheckpointError(f"{folder}: no stage of this run trained an adapter; expected one to export")
    written = []
    for (stage, name), path in found:
        network = assemble(recipe, run_tokenizer(folder), with_sources=False).network
        apply_train(network, recipe.stage(stage).train, f"stages.{stage}.train")
        _fill(network, read_tensors(path), str(path))
        place = target if len(found) == 1 else target / f"{stage}.{name}"
        written.append(export_adapter(recipe, network, name, place))
    return written


def _trained(recipe: Recipe, folder: Path) -> dict[tuple[str, str], Path]:
    """``(stage, adapter) -> file``; of an adapter that several stages went on with, the last."""
    found: dict[tuple[str, str], Path] = {}
    for index, stage in enumerate(recipe.stages):
        path = folder / "stages" / f"{index:02d}-{stage.name}" / ADAPTERS_FILE
        for entry in stage.train if path.is_file() else ():
            if entry.adapter is None:
                continue
            if not entry.is_merged:
                found = {key: old for key, old in found.items() if key[1] != entry.name}
            found[stage.name, entry.name] = path
    return found


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    own = adapter_parameters(network)
    strange = sorted(set(tensors) ^ {name for name, parameter in own.items() if parameter.requires_grad})
    if strange:
        raise CheckpointError(f"{where}: does not fit the stage's adapters, the first difference is {strange[0]}")
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
