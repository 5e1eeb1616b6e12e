"""Training a recipe: a run folder, its stages in order, resumable anywhere.

A run folder holds ``recipe.yaml`` (resolved), ``tokenizer.json``, ``quarantine.jsonl``, and per stage a folder
``stages/NN-name/`` with its ``metrics.jsonl``, its checkpoints and, once it is complete, ``weights.safetensors``.
``model.safetensors`` is written last: a folder that has it is a finished run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, DataError
from polymodal.data.loader import Loader
from polymodal.data.protocols import Source
from polymodal.data.quarantine import Quarantine
from polymodal.data.sources import open_source
from polymodal.models.compose import to_device
from polymodal.objectives.table import Losses, passes_of, weighted_losses
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.codes import fit_codes, remove_codes
from polymodal.recipes.lessons import open_anchors, open_teachers, remove_anchors
from polymodal.recipes.run_folder import (
    QUARANTINE,
    STAGES,
    WEIGHTS,
    claim,
    disk_errors,
    is_finished,
    locked,
    run_tokenizer,
)
from polymodal.recipes.schema import Recipe
from polymodal.recipes.tokenizers import read_text_tokenizers, write_text_tokenizers, write_tokenizer
from polymodal.training.accumulate import mean_losses
from polymodal.training.checkpoints import Keep
from polymodal.training.features import FeatureStore
from polymodal.training.freezing import apply_train, finish_train
from polymodal.training.lessons import Lessons
from polymodal.training.loop import StageContext, StageResult, StageRun
from polymodal.training.precision import Compute
from polymodal.training.progress import Progress, Update, make_progress
from polymodal.training.stage import StageConfig
from polymodal.training.weights import ADAPTERS_FILE, copy_weights, read_weights, save_adapters, save_weights


@dataclass(slots=True)
class RunResult:
    """What a training run did.

    Args:
        out: its folder.
        stages: per stage, its result; stages that were complete before are not in it.
        num_bad_samples: how often a sample could not be used.
        was_finished: the run was complete before, and nothing was done.
    """

    out: Path
    stages: dict[str, StageResult] = field(default_factory=dict)
    num_bad_samples: int = 0
    was_finished: bool = False


@dataclass(slots=True)
class _Run:
    recipe: Recipe
    out: Path
    parts: Assembly
    compute: Compute
    progress: Progress


def train(
    recipe: Recipe, out: str | os.PathLike[str], *, quiet: bool = False, progress: Progress | None = None
) -> RunResult:
    """Train every stage of a recipe into a run folder; called again, it resumes; a finished run is left as it is.

    Args:
        recipe: the recipe.
        out: the run folder.
        quiet: show no progress (for machines).
        progress: what a person sees; None decides by ``quiet`` and the terminal.

    Raises:
        CheckpointError: if the folder holds a run of another recipe or something else, another process writes to it, or
            the disk refuses.
        DataError: if data is missing, or too much of it is bad.
        CheckFailed: if a frozen tensor changed or a loss is not finite.
    """
    folder = Path(out)
    progress = progress or make_progress("silent" if quiet else "auto")
    with disk_errors(folder), locked(folder):
        claim(recipe, folder)
        result = RunResult(folder)
        if is_finished(folder):
            progress.note(f"{folder}: this run is finished; there is nothing to do. Its model is {folder / WEIGHTS}")
            result.was_finished = True
            return result
        tokenizer = run_tokenizer(folder)
        parts = assemble(recipe, tokenizer, read_text_tokenizers(folder))
        if tokenizer is None:
            write_text_tokenizers(parts.text_tokenizers, folder)
            write_tokenizer(parts.tokenizer, folder)
        compute = recipe.precision.resolve()
        compute.apply()
        parts.network.to(compute.device)
        run = _Run(recipe, folder, parts, compute, progress)
        for index, stage in enumerate(recipe.stages):
            _run_stage(run, index, stage, result)
        save_weights(parts.network, folder / WEIGHTS)
    return result


def stage_sources(recipe: Recipe, stage: StageConfig) -> list[Source]:
    """The sources of a stage's mix.

    Raises:
        DataError: if one is missing or empty.
    """
    return [entry.open(recipe.data_root) for entry in stage.data]


def _run_stage(run: _Run, index: int, stage: StageConfig, result: RunResult) -> None:
    folder = run.out / STAGES / f"{index:02d}-{stage.name}"
    done = folder / "weights.safetensors"
    network = run.parts.network
    if done.is_file():
        # Adapters that stay after the stage are among its weights.
        apply_train(network, stage.train, f"stages.{stage.name}.train")
        finish_train(network, stage.train)
        read_weights(network, done)
        _remove_checkpoints(folder)
        return
    _seed(run.recipe.seed + 1000 * (index + 1))
    for target, source in stage.copy_weights.items():
        copied = copy_weights(network, target, source)
        run.progress.note(f"{stage.name}: {target} starts with {copied} tensors of {source}")
    sources = stage_sources(run.recipe, stage)
    fit_codes(run.parts, stage, sources, folder, run.progress.note)
    apply_train(network, stage.train, f"stages.{stage.name}.train")
    quarantine = Quarantine(run.out / QUARANTINE, max_rate=run.recipe.max_bad_rate)
    with _features(run, stage, sources) as features:
        processor = features.processor if features is not None else run.parts.processor
        weights = [entry.weight for entry in stage.data]
        seed = run.recipe.seed + index
        with Loader(
            sources, weights, processor, stage.batch, seed=seed, quarantine=quarantine, cache=features
        ) as loader:
            lessons = open_teachers(run.parts, stage, run.compute.device)
            lessons.anchors = open_anchors(run.parts, stage, run.compute, folder)
            context = StageContext(
                stage=stage,
                model=network,
                loader=loader,
                compute=run.compute,
                folder=folder,
                keep=Keep(last=run.recipe.keep_last, best="min" if stage.validation is not None else None),
                progress=run.progress,
                features=features,
                validate=_validation(run, stage, lessons) if stage.validation is not None else None,
                lessons=lessons,
                tensorboard=run.out / "tensorboard" / stage.name if run.recipe.tensorboard else None,
            )
            result.stages[stage.name] = StageRun(context).run()
    result.num_bad_samples += quarantine.num_failed
    if quarantine.num_failed:
        run.progress.note(
            f"{stage.name}: {quarantine.num_failed:,} of {quarantine.num_tried:,} samples could not be used; "
            f"each is named in {quarantine.path}"
        )
    save_adapters(network, folder / ADAPTERS_FILE)
    finish_train(network, stage.train)
    save_weights(network, done)
    remove_anchors(folder)
    remove_codes(folder)
    _remove_checkpoints(folder)


def _remove_checkpoints(folder: Path) -> None:
    """The stage's weights say all that later stages need; its optimizer state is of no more use."""
    for pattern in ("step-*", "base-*", ".tmp-step-*", ".tmp-base-*", ".trash-*", ".old-*"):
        for entry in folder.glob(pattern):
            shutil.rmtree(entry, ignore_errors=True)


def _seed(seed: int) -> None:
    """Every generator that a stage may draw from starts where the stage starts, whatever ran before it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _features(run: _Run, stage: StageConfig, sources: list[Source]) -> Iterator[FeatureStore | None]:
    """The filled feature cache of a stage that asks for one."""
    if not stage.cache_features:
        yield None
        return
    with FeatureStore(run.out / "features", run.parts.network, run.parts.processor, run.compute) as store:
        if not store.tags:
            raise ConfigError(
                f"stages.{stage.name}.cache_features: every encoder of a stream with media trains in this stage, so "
                "that no feature stays the same; set it to false, or take the encoders out of 'train'"
            )
        run.progress.start(f"{stage.name}: encoding", sum(map(len, sources)), unit="samples")
        try:
            store.fill(sources, lambda done, _: run.progress.update(Update(done, {}, None, 0, 1)))
        finally:
            run.progress.stop()
        yield store


def _validation(run: _Run, stage: StageConfig, lessons: Lessons) -> Callable[[], float]:
    """The weighted objectives over the validation file, in evaluation mode."""
    assert stage.validation is not None
    objectives = stage.parsed_objectives()
    passes = passes_of(objectives)
    path, network = Path(run.recipe.data_root) / stage.validation, run.parts.network
    source = open_source(path)

    def losses(batch: Batch) -> Losses:
        moved = to_device(batch, run.compute.device)
        with run.compute.autocast():
            outputs = network(moved, passes)
        lessons.add(network, objectives, moved, outputs, run.compute.autocast)
        return weighted_losses(objectives, outputs, moved)

    def loss() -> float:
        modes = {module: module.training for module in network.modules()}
        network.eval()
        quarantine = Quarantine(max_rate=run.recipe.max_bad_rate)
        with (
            Loader([source], None, run.parts.processor, stage.batch, once=True, quarantine=quarantine) as batches,
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
        ):
            # What a loss draws at random (mismatches) is drawn alike every time, or two steps could not be compared.
            torch.manual_seed(run.recipe.seed)
            total, means = mean_losses(objectives, batches, losses)
        for module, mode in modes.items():
            module.training = mode
        if not means:
            raise DataError(f"{path}: nothing there counts for the objectives {[entry.name for entry in objectives]}")
        return total

    return loss
