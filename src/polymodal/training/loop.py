"""The one training loop: a stage of steps over a loader, resumable to the bit."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import CheckFailed, ConfigError
from polymodal.data.loader import Loader
from polymodal.models.backbones.transformers_decoder import TransformersDecoder
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.encoders.transformers_encoder import TransformersEncoder
from polymodal.models.heads.table import ProjectionHead
from polymodal.models.layers.multiway import Multiway
from polymodal.models.layers.transformer import Transformer
from polymodal.objectives.cached_step import cached_objectives_step
from polymodal.objectives.table import Losses, WeightedObjective, passes_of, weighted_losses
from polymodal.training.accumulate import Mean, batch_shares, scaled
from polymodal.training.checkpoints import Keep, best, latest, load_checkpoint, load_weights, save_base, save_checkpoint
from polymodal.training.cost import Cost, duration, mebibytes, peak_bytes, predict_cost
from polymodal.training.features import FeatureStore
from polymodal.training.freezing import fingerprint, frozen_names, set_modes
from polymodal.training.lessons import Lessons
from polymodal.training.metrics_log import MetricsLog
from polymodal.training.optimizers import clip_gradients, set_rate
from polymodal.training.precision import Compute
from polymodal.training.progress import Progress, Update
from polymodal.training.pruning import Pruner
from polymodal.training.stage import StageConfig
from polymodal.training.state_files import random_state, set_random_state
from polymodal.training.twin import Twin

METRICS = "metrics.jsonl"
_NAMED = 8
"""How many samples a message names."""


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
        validate: the validation loss, or None; lower is better.
        tensorboard: folder for TensorBoard's files, or None.
        lessons: teachers and anchors that objectives read.
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
    lessons: Lessons = field(default_factory=Lessons)


@dataclass(slots=True)
class StageResult:
    """What a stage did.

    Args:
        steps: its steps.
        losses: of its last step.
        num_tokens: read by this process; num_samples, seconds: likewise.
        best_step: the step whose weights are kept, where a validation loss chose.
        validation: that loss.
        cost: what was predicted; None if there was nothing left to do.
        sparsity: share of the pruned matrices that is zero, where the stage prunes.
    """

    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_samples: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    validation: float | None = None
    cost: Cost | None = None
    sparsity: float | None = None


class StageRun:
    """Runs one stage to its end, from its newest checkpoint if there is one."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        stage, model = context.stage, context.model
        self.objectives: Sequence[WeightedObjective] = stage.parsed_objectives()
        self.passes = passes_of(self.objectives)
        self.optimizer = stage.optimizer.build(model)
        self.twin = Twin.of(model, self.objectives)
        self.pruner = None if stage.prune is None else Pruner(stage.prune, model, stage.steps)
        self.step = 0
        self.base: str | None = None
        for module in model.modules():
            if isinstance(module, Transformer | Multiway | TransformersDecoder | TransformersEncoder):
                module.checkpointing = stage.checkpoint_activations

    def run(self) -> StageResult:
        """Train to the stage's last step; with a validation loss, the model then has the weights of the best one.

        Raises:
            CheckFailed: if something frozen changed, or a loss is not finite.
        """
        context, stage = self.context, self.context.stage
        set_modes(context.model)
        frozen = frozen_names(context.model)
        before = fingerprint(context.model, frozen)
        self._restore()
        result = StageResult(stage.steps)
        context.lessons.check(self.objectives)
        if self.step < stage.steps:
            self._train(frozen, result)
        if fingerprint(context.model, frozen) != before:
            raise CheckFailed(f"stage {stage.name!r}: a frozen tensor changed during the stage; its result is not kept")
        if self.pruner is not None:
            result.sparsity = self.pruner.prove(stage.name)
            count = len(self.pruner.weights)
            context.progress.note(f"{stage.name}: {result.sparsity:.1%} of the weights of {count} matrices are zero")
        self._take_best(result)
        return result

    def predict(self, batch: Batch) -> Cost:
        """What the rest of the stage will take, from two passes over ``batch``; changes nothing.

        Where batches are of one source each, ``batch`` says nothing of the other sources, and one of each is read.
        """
        stage = self.context.stage
        cost = predict_cost(
            self.context.model,
            self.optimizer,
            self._kinds(batch),
            batches_per_step=stage.accumulate,
            num_steps=stage.steps - self.step,
        )
        if self.twin is not None:
            self.twin.forget()
        return cost

    def _kinds(self, batch: Batch) -> Iterator[tuple[float, Callable[[], object]]]:
        """The passes over each kind of batch, with its share of the batches."""
        is_any = False
        for share, one in self.context.loader.kinds() if self.context.stage.batch.one_source else ():
            is_any = True
            yield share, functools.partial(self._backward, [one])
        if not is_any:
            yield 1.0, functools.partial(self._backward, [batch])

    def _train(self, frozen: set[str], result: StageResult) -> None:
        context, stage = self.context, self.context.stage
        if context.validate is not None or stage.save_every < stage.steps:
            self.base = self._save_base(frozen)
        stream = iter(context.loader)
        first = next(stream)
        batches = itertools.chain([first], stream)
        result.cost = self.predict(first)
        self._announce(result.cost)
        started = time.perf_counter()
        context.progress.start(stage.name, stage.steps, self.step)
        with MetricsLog(context.folder / METRICS, self.step, context.tensorboard) as log:
            try:
                while self.step < stage.steps:
                    self._advance(batches, log, frozen, result)
            finally:
                context.progress.stop()
        result.seconds = time.perf_counter() - started
        context.progress.note(
            f"{stage.name}: took {duration(result.seconds)}, predicted {duration(result.cost.total_s)}; "
            f"peak memory {mebibytes(peak_bytes())}, predicted {mebibytes(result.cost.peak_bytes)}"
        )

    def _announce(self, cost: Cost) -> None:
        parameters = list(self.context.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - trained
        self.context.progress.note(
            f"{self.context.stage.name}: {trained:,} parameters train, {frozen:,} are frozen; predicted {cost}"
        )

    def _advance(self, batches: Iterator[Batch], log: MetricsLog, frozen: set[str], result: StageResult) -> None:
        """One step with all that belongs to it: metrics, validation, checkpoint."""
        context, stage = self.context, self.context.stage
        micro = [next(batches) for _ in range(stage.accumulate)]
        losses = self._one_step(micro)
        self.step += 1
        num_tokens = sum(int(batch.is_valid.sum()) for batch in micro)
        num_samples = sum(batch.num_samples for batch in micro)
        result.losses = losses
        result.num_tokens += num_tokens
        result.num_samples += num_samples
        is_last = self.step == stage.steps
        metric = None
        if context.validate is not None and (is_last or self.step % (stage.eval_every or 1) == 0):
            metric = context.validate()
        rate = float(self.optimizer.param_groups[0]["lr"])
        record = losses if metric is None else {**losses, "validation": metric}
        log.append(self.step, {**record, "lr": rate, "num_tokens": num_tokens, "num_samples": num_samples})
        shown = {name: value for name, value in record.items() if name != "grad_norm"}
        context.progress.update(Update(self.step, shown, rate, num_tokens, num_samples))
        if metric is not None or (self.step % stage.save_every == 0 and not is_last):
            self._save(frozen, metric)

    def _one_step(self, micro: Sequence[Batch]) -> dict[str, float]:
        stage = self.context.stage
        set_rate(self.optimizer, stage.schedule.factor(self.step, stage.steps))
        losses = self._backward(micro)
        if stage.clip is not None:
            losses["grad_norm"] = clip_gradients(self.optimizer, stage.clip)
        self._demand_finite(losses, micro)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.pruner is not None:
            losses["sparsity"] = self.pruner.after(self.step + 1)
        if self.twin is not None:
            self.twin.follow()
        return losses

    def _backward(self, micro: Sequence[Batch]) -> dict[str, float]:
        """Add the gradients of the batches as of one; the values for the log."""
        if self.context.stage.grad_cache:
            return self._backward_cached([self._ready(batch) for batch in micro])
        mean = Mean()
        for batch, shares in zip(micro, batch_shares(self.objectives, micro), strict=True):
            losses = self._losses(self._ready(batch), scaled(self.objectives, shares))
            if losses.total.requires_grad:
                losses.total.backward()  # type: ignore[no-untyped-call]
            values = losses.values()
            self._demand_finite(values, [batch])
            mean.add(values, shares)
        return mean.values()

    def _backward_cached(self, micro: Sequence[Batch]) -> dict[str, float]:
        def head() -> tuple[Tensor, Tensor]:
            projection = self.context.model.head("projection")
            assert isinstance(projection, ProjectionHead)
            if projection.has_own_scales:
                raise ConfigError("grad_cache: the projection head has scales per stream, expected a shared one")
            return projection.scale, projection.bias

        return cached_objectives_step(micro, self._forward, self.objectives, head).values()

    def _losses(self, batch: Batch, objectives: Sequence[WeightedObjective]) -> Losses:
        outputs = self._forward(batch)
        if self.twin is not None:
            self.twin.teach(batch, outputs, self.context.compute.autocast)
        context = self.context
        context.lessons.add(context.model, self.objectives, batch, outputs, context.compute.autocast)
        return weighted_losses(objectives, outputs, batch)

    def _forward(self, batch: Batch) -> Outputs:
        with self.context.compute.autocast():
            outputs: Outputs = self.context.model(batch, self.passes)
        return outputs

    def _ready(self, batch: Batch) -> Batch:
        if self.context.features is not None:
            self.context.features.attach(batch)
        return to_device(batch, self.context.compute.device)

    def _demand_finite(self, losses: dict[str, float], micro: Sequence[Batch]) -> None:
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if not bad:
            return
        names = [name for batch in micro for name in batch.sample_ids]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise CheckFailed(
            f"stage {self.context.stage.name!r}, step {self.step + 1}: {bad[0]} is {losses[bad[0]]}, expected a finite "
            f"number, on the samples {', '.join(names[:_NAMED])}{more}; look at them, or lower the learning rate"
        )

    def _save_base(self, frozen: set[str]) -> str | None:
        """Frozen weights are written once per stage, not with every checkpoint."""
        if not frozen:
            return None
        state = self.context.model.state_dict()
        return save_base(self.context.folder, {name: state[name] for name in sorted(frozen)})

    def _save(self, frozen: set[str], metric: float | None) -> None:
        context = self.context
        state = {
            "optimizer": self.optimizer.state_dict(),
            "loader": context.loader.state(),
            "random": random_state(),
            **({} if self.twin is None else {"twin": self.twin.state()}),
            **({} if self.pruner is None else {"masks": self.pruner.state()}),
        }
        weights = {name: tensor for name, tensor in context.model.state_dict().items() if name not in frozen}
        save_checkpoint(context.folder, weights, state, self.step, base=self.base, metric=metric, keep=context.keep)

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
        if self.twin is not None:
            self.twin.restore(checkpoint.state["twin"])
        if self.pruner is not None:
            self.pruner.restore(checkpoint.state["masks"])
        self.step = checkpoint.step

    def _take_best(self, result: StageResult) -> None:
        """Load the weights with the lowest validation loss."""
        found = best(self.context.folder, "min") if self.context.validate is not None else None
        if found is None:
            return
        result.best_step, result.validation = found.step, found.metric
        if found.step != self.context.stage.steps:
            load_weights(self.context.model, load_checkpoint(found.path).weights, str(found.path))
            self.context.progress.note(
                f"{self.context.stage.name}: the weights of step {found.step:,} are kept, whose validation loss "
                f"{found.metric:.4f} is the lowest"
            )
