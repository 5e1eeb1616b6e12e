"""Training a recipe: a run folder, its stages in order, resumable anywhere.

A run folder holds ``recipe.yaml`` (resolved), ``tokenizer.json``, ``quarantine.jsonl``, and per stage
``stages/NN-name/`` with its ``metrics.jsonl``, its checkpoints and, once it is complete, ``weights.safetensors``. ``model.safetensors`` is
written last: a folder that has it is a finished run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from polymodal.core.errors import CheckpointError
from polymodal.data.loader import Loader
from polymodal.data.quarantine import Quarantine
from polymodal.data.sources import open_source
from polymodal.modalities.text import Tokenizer
from polymodal.models.adapters import merge_lora
from polymodal.models.compose import to_device
from polymodal.objectives.table import weighted_losses
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.model import RECIPE, TOKENIZER, WEIGHTS
from polymodal.recipes.schema import Recipe
from polymodal.training.checkpoints import Keep
from polymodal.training.features import FeatureStore
from polymodal.training.freezing import apply_train
from polymodal.training.loop import StageContext, StageResult, StageRun
from polymodal.training.precision import Compute
from polymodal.training.progress import Progress, Update, make_progress
from polymodal.training.stage import StageConfig
from polymodal.training.weights import read_weights, save_weights

Report = Callable[[str], None]


@dataclass(slots=True)
class RunResult:
    """What a training run did: per stage, its result; stages that were complete before are not in it."""

    out: Path
    stages: dict[str, StageResult] = field(default_factory=dict)
    num_bad_samples: int = 0


@dataclass(slots=True)
class _Run:
    recipe: Recipe
    out: Path
    parts: Assembly
    compute: Compute
    progress: Progress


def train(recipe: Recipe, out: str | os.PathLike[str], *, quiet: bool = False) -> RunResult:
    """Train every stage of a recipe into a run folder; called again, it resumes.

    Args:
        recipe: the recipe.
        out: the run folder.
        quiet: show no progress (for machines).

    Raises:
        CheckpointError: if the folder holds a run of another recipe.
        DataError: if data is missing, or too much of it is bad.
        CheckFailed: if a frozen tensor changed or a loss is not finite.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _claim(recipe, folder)
    parts = assemble(recipe, tokenizer)
    if tokenizer is None:
        parts.tokenizer.save(folder / TOKENIZER)
    compute = recipe.precision.resolve()
    compute.apply()
    parts.network.to(compute.device)
    run = _Run(recipe, folder, parts, compute, make_progress("silent" if quiet else "auto"))
    result = RunResult(folder)
    for index, stage in enumerate(recipe.stages):
        _run_stage(run, index, stage, result)
    if not (folder / WEIGHTS).is_file():
        save_weights(parts.network, folder / WEIGHTS)
    return result


def _claim(recipe: Recipe, folder: Path) -> Tokenizer | None:
    """Write the recipe into a new folder, or prove that a used one holds the same; returns the run's tokenizer."""
    path = folder / RECIPE
    if path.is_file():
        if load_recipe(path) != recipe:
            raise CheckpointError(
                f"{folder}: holds a run of another recipe (see {path}); choose another --out, or remove the folder"
            )
    else:
        partial = path.with_suffix(".part")
        partial.write_text(dump_recipe(recipe), encoding="utf-8")
        partial.replace(path)
    if (folder / TOKENIZER).is_file():
        return Tokenizer.load(folder / TOKENIZER)
    return None


def _run_stage(run: _Run, index: int, stage: StageConfig, result: RunResult) -> None:
    folder = run.out / "stages" / f"{index:02d}-{stage.name}"
    done = folder / "weights.safetensors"
    network = run.parts.network
    if done.is_file():
        read_weights(network, done)
        return
    torch.manual_seed(run.recipe.seed + 1000 * (index + 1))
    apply_train(network, stage.train, f"stages.{stage.name}.train")
    features = _features(run, stage)
    processor = features.processor if features is not None else run.parts.processor
    quarantine = Quarantine(run.out / "quarantine.jsonl", max_rate=run.recipe.max_bad_rate)
    sources = [open_source(Path(run.recipe.data_root) / entry.path) for entry in stage.data]
    with Loader(
        sources,
        [entry.weight for entry in stage.data],
        processor,
        stage.batch,
        seed=run.recipe.seed + index,
        quarantine=quarantine,
        cache=features,
    ) as loader:
        context = StageContext(
            stage=stage,
            model=network,
            loader=loader,
            compute=run.compute,
            folder=folder,
            keep=Keep(last=run.recipe.keep_last, best="min" if stage.validation is not None else None),
            progress=run.progress,
            features=features,
            validate=_validation(run, stage) if stage.validation is not None else None,
            tensorboard=run.out / "tensorboard" / stage.name if run.recipe.tensorboard else None,
        )
        result.stages[stage.name] = StageRun(context).run()
    result.num_bad_samples += quarantine.num_failed
    if features is not None:
        features.close()
    merge_lora(network)
    save_weights(network, done)
    # The stage's weights say all that later stages need; its optimizer state is of no more use.
    for checkpoint in (*folder.glob("step-*"), *folder.glob("base-*")):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _features(run: _Run, stage: StageConfig) -> FeatureStore | None:
    if not stage.cache_features:
        return None
    store = FeatureStore(run.out / "features", run.parts.network, run.parts.processor, run.compute)
    sources = [open_source(Path(run.recipe.data_root) / entry.path) for entry in stage.data]
    run.progress.start(f"{stage.name}: encoding", sum(map(len, sources)))
    try:
        store.fill(sources, lambda done, _: run.progress.update(Update(done, {}, 0.0, 0, 1)))
    finally:
        run.progress.stop()
    return store


def _validation(run: _Run, stage: StageConfig) -> Callable[[], float]:
    """The mean objective over the validation file, in evaluation mode."""
    objectives = stage.parsed_objectives()
    passes = {entry.config.needs for entry in objectives}

    def loss() -> float:
        assert stage.validation is not None
        source = open_source(Path(run.recipe.data_root) / stage.validation)
        network, total, count = run.parts.network, 0.0, 0
        modes = {module: module.training for module in network.modules()}
        network.eval()
        with Loader([source], None, run.parts.processor, stage.batch, once=True) as batches, torch.no_grad():
            for batch in batches:
                moved = to_device(batch, run.compute.device)
                with run.compute.autocast():
                    outputs = network(moved, passes)
                losses = weighted_losses(objectives, outputs, moved)
                total += float(losses.total) * batch.num_samples
                count += batch.num_samples
        for module, mode in modes.items():
            module.training = mode
        return total / max(count, 1)

    return loss


