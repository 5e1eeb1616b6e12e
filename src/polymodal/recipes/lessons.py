"""Opening what a stage's objectives learn from: teachers, and the old task that must not be forgotten."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import ConfigError
from polymodal.data.loader import Loader
from polymodal.data.planner import BatchSpec
from polymodal.data.quarantine import Quarantine
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.objectives.consolidation import Consolidation
from polymodal.objectives.distill import teachers_of
from polymodal.objectives.table import passes_of
from polymodal.recipes.assemble import Assembly
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run_folder import RECIPE
from polymodal.recipes.schema import Recipe
from polymodal.recipes.stored_models import load_assembly
from polymodal.training.consolidation import Anchor, estimate_fisher
from polymodal.training.lessons import Lessons
from polymodal.training.precision import Compute
from polymodal.training.stage import StageConfig


def open_teachers(parts: Assembly, stage: StageConfig, device: torch.device | str) -> Lessons:
    """The teachers of a stage, frozen, in evaluation mode, on the device.

    Raises:
        ConfigError: if one cannot read the batches of this recipe.
        CheckpointError: if there is none at a path.
    """
    teachers: dict[str, MultimodalModel] = {}
    for path in teachers_of(stage.parsed_objectives()):
        theirs = load_assembly(path)
        _refuse_other_reading(parts, theirs, path)
        teachers[path] = theirs.network.requires_grad_(False).eval().to(device)
    return Lessons(teachers)


def _refuse_other_reading(mine: Assembly, theirs: Assembly, path: str) -> None:
    """A teacher gets the model's batches: what it reads must have been prepared as it expects."""
    for name, stream in theirs.recipe.model.streams.items():
        own = mine.recipe.model.streams.get(name)
        if own is None:
            raise ConfigError(
                f"teacher {path}: has the stream {name!r}, the model has {sorted(mine.recipe.model.streams)}; expected "
                "its streams among the model's"
            )
        if own.reader != stream.reader:
            raise ConfigError(
                f"teacher {path}: reads the stream {name!r} as {stream.reader}, the model as {own.reader}; expected "
                "the same reader: give it to the model's stream"
            )
    reads_text = any(stream.modality == "text" for stream in theirs.recipe.model.streams.values())
    reads_text = reads_text or theirs.processor.chat is not None
    if reads_text and mine.tokenizer.hub_files() != theirs.tokenizer.hub_files():
        raise ConfigError(
            f"teacher {path}: has another tokenizer than the model; expected the same: "
            f"model.tokenizer: {{use: file, path: {path}/tokenizer.json}}"
        )


def open_anchors(parts: Assembly, stage: StageConfig, compute: Compute, folder: Path) -> dict[str, Anchor]:
    """The anchors of a stage's ``ewc`` objectives: read where an interrupted run left them, else estimated and saved.

    Args:
        parts: the model with ``requires_grad`` set, where the old task is done.
        stage: the new stage.
        compute: device and precision.
        folder: of the stage.

    Raises:
        ConfigError: if an old stage is not there, or has nothing to estimate from.
    """
    anchors = {}
    for place, config in enumerate(_consolidations(stage)):
        path = folder / f"fisher-{place}.safetensors"
        if path.is_file():
            anchors[config.key] = Anchor.load(path, parts.network)
            continue
        recipe, old = old_stage(parts.recipe, stage, config)
        with torch.random.fork_rng(devices=[]):
            anchor = _estimate(parts, recipe, old, config, compute)
        anchor.save(path)
        anchors[config.key] = anchor
    return anchors


def remove_anchors(folder: Path) -> None:
    """The estimates of a complete stage are of no more use."""
    for path in folder.glob("fisher-*.safetensors"):
        path.unlink()


def _consolidations(stage: StageConfig) -> list[Consolidation]:
    return [entry.config for entry in stage.parsed_objectives() if isinstance(entry.config, Consolidation)]


def old_stage(recipe: Recipe, stage: StageConfig, config: Consolidation) -> tuple[Recipe, StageConfig]:
    """The stage that an ``ewc`` objective keeps, and its recipe.

    Raises:
        ConfigError: if there is none of that name, or it does not stand before the new one.
    """
    if config.run is not None:
        other = load_recipe(Path(config.run) / RECIPE)
        return other, other.stage(config.stage)
    names = [one.name for one in recipe.stages]
    before = names[: names.index(stage.name)]
    if config.stage not in before:
        raise ConfigError(
            f"stages.{stage.name}.objectives.ewc.stage: found {config.stage!r}, expected a stage before this one, of "
            f"{before}; or name the run that it belongs to"
        )
    return recipe, recipe.stage(config.stage)


def check_old_stages(recipe: Recipe, stage: StageConfig) -> str | None:
    """Prove that every stage that must be kept is there; None if there is none to keep."""
    found = [old_stage(recipe, stage, config)[1].name for config in _consolidations(stage)]
    return f"keeps {', '.join(found)}" if found else None


def _estimate(parts: Assembly, recipe: Recipe, old: StageConfig, config: Consolidation, compute: Compute) -> Anchor:
    objectives = old.parsed_objectives()
    passes = passes_of(objectives)
    sources = [entry.open(recipe.data_root) for entry in old.data]
    weights = [entry.weight for entry in old.data]
    quarantine = Quarantine(max_rate=recipe.max_bad_rate)

    def forward(batch: Batch) -> Outputs:
        with compute.autocast():
            outputs: Outputs = parts.network(batch, passes)
        return outputs

    one = BatchSpec(samples=1)
    with Loader(sources, weights, parts.processor, one, seed=recipe.seed, quarantine=quarantine) as loader:
        drawn = (to_device(batch, compute.device) for batch in itertools.islice(loader, config.samples))
        return estimate_fisher(parts.network, objectives, drawn, forward)
