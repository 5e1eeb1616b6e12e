"""The one training loop: a stage of steps over a loader, resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import CheckFailed
from polymodal.data.loader import Loader
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.heads.table import ProjectionHead
from polymodal.objectives.cached_step import cached_objectives_step
from polymodal.objectives.table import Losses, WeightedObjective, weighted_losses
from polymodal.training.checkpoints import Keep, latest, load_checkpoint, load_weights, save_base, save_checkpoint
from polymodal.training.features import FeatureStore
from polymodal.training.freezing import fingerprint, frozen_names, set_modes
from polymodal.training.metrics_log import MetricsLog
from polymodal.training.optimizers import clip_gradients, set_rate
from polymodal.training.precision import Compute
from polymodal.training.progress import Progress, Update
from polymodal.training.stage import StageConfig
from polymodal.training.state_files import random_state, set_random_state


@dataclass(slots=True)
class StageContext:
    """What a stage runs on; made by ``recipes``, which knows the whole recipe.

    Args:
        stage: its config.
        model: with adapters applied and ``requires_grad`` set; on the device.
        loader: endless batches of the stage's mix.
        compute: device and dtype.
        folder: where checkpoints and metrics go.
        keep: which checkpoints stay.
        progress: what a person sees.
        features: cached features of frozen encoders, or None.
        validate: the validation loss, or None.
        tensorboard: folder for TensorBoard's files, or None.
    """

    stage: StageConfig
    model: MultimodalModel
    loader: Loader
    compute: Compute
    folder: Path
    keep: Keep
    progress: Progress
    features: FeatureStore | None = None
    validate: Callable[[], float] | None = None
    tensorboard: Path | None = None


@dataclass(slots=True)
class StageResult:
    """What a stage did: its last losses, and how much it read in how long (this process only)."""

    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_samples: int = 0
    seconds: float = 0.0


class StageRun:
    """Runs one stage to its end, from its newest checkpoint if there is one."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        stage, model = context.stage, context.model
        self.objectives: Sequence[WeightedObjective] = stage.parsed_objectives()
        self.passes = frozenset(entry.config.needs for entry in self.objectives)
        self.optimizer = stage.optimizer.build(model)
        self.step = 0
        self.base: str | None = None
        for module in model.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = stage.checkpoint_activations

    def run(self) -> StageResult:
        """Train to the stage's last step.

        Raises:
            CheckFailed: if something frozen changed, or a loss is not finite.
        """
        context, stage = self.context, self.context.stage
        set_modes(context.model)
        frozen = frozen_names(context.model)
        before = fingerprint(context.model, frozen)
        self._restore()
        self.base = self._save_base(frozen)
        result = StageResult(stage.steps)
        started = time.perf_counter()
        batches = iter(context.loader)
        context.progress.start(stage.name, stage.steps, self.step)
        with MetricsLog(context.folder / "metrics.jsonl", self.step, context.tensorboard) as log:
            try:
                while self.step < stage.steps:
                    losses, seen = self._one_step(batches)
                    self.step += 1
                    result.losses = losses
                    result.num_tokens += seen[0]
                    result.num_samples += seen[1]
                    self._record(log, losses, seen)
                    if self.step % stage.save_every == 0 and self.step < stage.steps:
                        self._save(frozen)
            finally:
                context.progress.stop()
        result.seconds = time.perf_counter() - started
        if fingerprint(context.model, frozen) != before:
            raise CheckFailed(f"stage {stage.name!r}: a frozen tensor changed during the stage; its result is not kept")
        return result

    def _save_base(self, frozen: set[str]) -> str | None:
        """Frozen weights are written once per stage, not with every checkpoint."""
        if not frozen or self.context.stage.save_every >= self.context.stage.steps:
            return None
        state = self.context.model.state_dict()
        return save_base(self.context.folder, {name: state[name] for name in sorted(frozen)})

    def _restore(self) -> None:
        """Continue from the newest complete checkpoint of this stage."""
        found = latest(self.context.folder)
        if found is None:
            return
        for path, reason in found.skipped:
            self.context.progress.note(f"checkpoint {path.name} is damaged and was skipped: {reason}")
        checkpoint = load_checkpoint(found.path)
        load_weights(self.context.model, checkpoint.weights, str(found.path))
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.context.loader.restore(checkpoint.state["loader"])
        set_random_state(checkpoint.state["random"])
        self.step = checkpoint.step

    def _one_step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], tuple[int, int]]:
        context, stage = self.context, self.context.stage
        set_rate(self.optimizer, stage.schedule.factor(self.step, stage.steps))
        micro = [self._ready(next(batches)) for _ in range(stage.accumulate)]
        losses = self._backward_cached(micro) if stage.grad_cache else self._backward(micro)
        if stage.clip is not None:
            losses["grad_norm"] = clip_gradients(self.optimizer, stage.clip)
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise CheckFailed(
                f"stage {stage.name!r}, step {self.step}: {bad[0]} is {losses[bad[0]]}; lower the learning rate or "
                f"look at the samples {micro[0].sample_ids[:3]}..."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(int(batch.is_valid.sum()) for batch in micro)
        return losses, (num_tokens, sum(batch.num_samples for batch in micro))

    def _ready(self, batch: Batch) -> Batch:
        if self.context.features is not None:
            self.context.features.attach(batch)
        return to_device(batch, self.context.compute.device)

    def _backward(self, micro: Sequence[Batch]) -> dict[str, float]:
        values: dict[str, float] = {}
        for batch in micro:
            losses = self._losses(batch)
            if losses.total.requires_grad:
                (losses.total / len(micro)).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.values().items():
                values[name] = values.get(name, 0.0) + value / len(micro)
        return values

    def _losses(self, batch: Batch) -> Losses:
        with self.context.compute.autocast():
            outputs = self.context.model(batch, self.passes)
        return weighted_losses(self.objectives, outputs, batch)

    def _backward_cached(self, micro: Sequence[Batch]) -> dict[str, float]:
        def forward(batch: Batch) -> Outputs:
            with self.context.compute.autocast():
                outputs: Outputs = self.context.model(batch, self.passes)
            return outputs

        def head() -> tuple[Tensor, Tensor]:
            projection = self.context.model.head("projection")
            assert isinstance(projection, ProjectionHead)
            return projection.scale, projection.bias

        return cached_objectives_step(micro, forward, self.objectives, head).values()

    def _record(self, log: MetricsLog, losses: dict[str, float], seen: tuple[int, int]) -> None:
        rate = float(self.optimizer.param_groups[0]["lr"])
        log.append(self.step, {**losses, "lr": rate, "num_tokens": seen[0], "num_samples": seen[1]})
        shown = {name: value for name, value in losses.items() if name != "grad_norm"}
        self.context.progress.update(Update(self.step, shown, rate, *seen))

    def _save(self, frozen: set[str]) -> None:
        context = self.context
        evaluates = context.validate is not None and self.step % (context.stage.eval_every or 1) == 0
        metric = context.validate() if evaluates and context.validate is not None else None
        state = {
            "optimizer": self.optimizer.state_dict(),
            "loader": context.loader.state(),
            "random": random_state(),
        }
        weights = {name: tensor for name, tensor in context.model.state_dict().items() if name not in frozen}
        save_checkpoint(context.folder, weights, state, self.step, base=self.base, metric=metric, keep=context.keep)
