"""``polymodal check``: the proofs of a recipe, each with its figure, before a training step is spent.

Every proof runs the recipe's own modules on samples of its own data, in float32, on random weights. ``proofs_of_data``
holds what concerns samples and their layout, ``proofs_of_training`` what concerns gradients, memory and time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from polymodal.core.errors import CheckFailed, PolymodalError
from polymodal.data.sources import open_source
from polymodal.evaluation.tasks import TASKS
from polymodal.recipes import proofs_of_data as data
from polymodal.recipes import proofs_of_training as training
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.lessons import check_old_stages, open_teachers
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.run import stage_sources
from polymodal.recipes.run_folder import RECIPE, WEIGHTS
from polymodal.recipes.schema import Recipe
from polymodal.training.freezing import apply_train, fingerprint
from polymodal.training.lessons import Lessons
from polymodal.training.stage import StageConfig
from polymodal.training.weights import read_weights, save_weights

Status = Literal["ok", "failed", "skipped"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Proof:
    """One line of the table: what was proved, where, whether it holds, and the figure."""

    name: str
    where: str
    status: Status
    figure: str


@dataclass(slots=True)
class CheckReport:
    """All proofs of a recipe."""

    recipe: str
    proofs: list[Proof] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether no proof failed."""
        return not self.failed

    @property
    def failed(self) -> list[Proof]:
        """The proofs that do not hold."""
        return [proof for proof in self.proofs if proof.status == "failed"]

    def raise_failed(self) -> None:
        """Raise if a proof failed.

        Raises:
            CheckFailed: naming every failed proof.
        """
        if self.failed:
            raise CheckFailed("\n".join(f"{proof.name} ({proof.where}): {proof.figure}" for proof in self.failed))

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        rows = [{"proof": p.name, "where": p.where, "status": p.status, "figure": p.figure} for p in self.proofs]
        return {"recipe": self.recipe, "ok": self.is_ok, "proofs": rows}


def check_recipe(recipe: Recipe, watch: Callable[[Proof], None] | None = None) -> CheckReport:
    """Run every proof that concerns a recipe.

    A proof that raises is reported as failed with its message, and the others still run, as far as they do not need it.

    Args:
        recipe: the recipe.
        watch: called with every proof when it is done.
    """
    report = CheckReport(recipe.name)
    prove = _Prover(report, watch)
    prove("recipe reloads equal", "recipe", lambda: _reloads(recipe))
    for stage in recipe.stages:
        prove("data is there", f"stage {stage.name}", lambda stage=stage: _sources(recipe, stage))  # type: ignore[misc]
    if recipe.evaluate:
        prove("data is there", "evaluate", lambda: _evaluation_data(recipe))
    if report.failed:
        return report
    parts = prove.get("parts build", "model", lambda: assemble(recipe), _sizes)
    if parts is None:
        return report
    for stage in recipe.stages:
        _check_stage(prove, parts, stage)
    prove("save and load give the same weights", "model", lambda: _saves(parts))
    return report


class _Prover:
    """Runs proofs and writes their lines."""

    def __init__(self, report: CheckReport, watch: Callable[[Proof], None] | None) -> None:
        self.report = report
        self._watch = watch

    def __call__(self, name: str, where: str, proof: Callable[[], str | None]) -> None:
        """Run one proof: its return value is the figure; None means that it does not apply; an error that it failed."""
        try:
            figure = proof()
        except PolymodalError as error:
            self._add(Proof(name, where, "failed", str(error)))
            return
        except Exception as error:  # noqa: BLE001 (a part that breaks on its own data is what a check is to find)
            self._add(Proof(name, where, "failed", f"broke with {type(error).__name__}: {error}"))
            return
        self._add(Proof(name, where, "skipped" if figure is None else "ok", figure or "does not apply"))

    def get(self, name: str, where: str, make: Callable[[], T], figure: Callable[[T], str | None]) -> T | None:
        """Like calling, for a step whose result the next proofs need; None if it failed."""
        made: list[T] = []

        def proof() -> str | None:
            made.append(make())
            return figure(made[0])

        self(name, where, proof)
        return made[0] if made else None

    def _add(self, proof: Proof) -> None:
        self.report.proofs.append(proof)
        if self._watch is not None:
            self._watch(proof)


def _check_stage(prove: _Prover, parts: Assembly, stage: StageConfig) -> None:
    where = f"stage {stage.name}"
    sources = stage_sources(parts.recipe, stage)
    probe = data.Probe.draw(parts, stage, sources)
    prove("samples can be read and laid out", where, lambda: data.layout(probe))
    prove("samples fit, no media span is cut", where, lambda: data.fit(probe))
    prove("every sample has supervised tokens", where, lambda: data.supervised(probe))
    prove("targets are the assistant's own words", where, lambda: data.targets(probe))
    prove("labels are known", where, lambda: data.labels(probe))
    prove("media decode", where, lambda: data.decode(probe))
    if not probe.examples:
        return
    prove("placeholders = features", where, lambda: data.placeholders(probe))
    prove("packing leaks nothing", where, lambda: data.packing(probe))
    prove("padding and order change nothing", where, lambda: data.padding(probe))
    # Adapters and gradients are tried on a copy: the next stage starts from the model without them.
    trial = copy.deepcopy(parts.network)
    trained = prove.get(
        "what trains is found",
        where,
        lambda: apply_train(trial, stage.train, f"stages.{stage.name}.train"),
        lambda names: f"{len(names)} tensors",
    )
    if trained is None:
        return
    prove("what must be kept is there", where, lambda: check_old_stages(parts.recipe, stage))
    lessons = prove.get("teachers fit", where, lambda: open_teachers(parts, stage, "cpu"), _teachers)
    if lessons is None:
        return
    attempt = training.Attempt(probe, trial, trained, lessons)
    prove("frozen parts stay frozen", where, lambda: training.frozen(attempt))
    prove("every trained part gets a gradient", where, lambda: training.reached(attempt))
    prove("predicted cost", where, lambda: training.cost(attempt, sources))


def _teachers(lessons: Lessons) -> str | None:
    return ", ".join(lessons.teachers) or None


def _reloads(recipe: Recipe) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RECIPE
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        if load_recipe(path) != recipe:
            raise CheckFailed("the resolved recipe does not read back as an equal value")
    return f"{len(recipe.stages)} stages"


def _sources(recipe: Recipe, stage: StageConfig) -> str:
    sources = stage_sources(recipe, stage)
    counts = [f"{len(source):,} {entry.path}" for source, entry in zip(sources, stage.data, strict=True)]
    if stage.validation is not None:
        counts.append(
            f"{len(open_source(Path(recipe.data_root) / stage.validation)):,} {stage.validation} (validation)"
        )
    return ", ".join(counts)


def _evaluation_data(recipe: Recipe) -> str:
    tasks = [TASKS.parse(entry, f"evaluate[{index}]") for index, entry in enumerate(recipe.evaluate)]
    counts = [f"{len(open_source(Path(recipe.data_root) / task.data)):,} {task.data}" for task in tasks]
    return ", ".join(counts)


def _sizes(parts: Assembly) -> str:
    count = sum(parameter.numel() for parameter in parts.network.parameters())
    return f"{count:,} parameters, {parts.tokenizer.size:,} token ids"


def _saves(parts: Assembly) -> str:
    network = parts.network
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        save_weights(network, path)
        other = assemble(parts.recipe, parts.tokenizer).network
        for parameter in other.parameters():
            parameter.data.zero_()
        read_weights(other, path)
        size = path.stat().st_size
    names = list(network.state_dict())
    if fingerprint(network, names) != fingerprint(other, names):
        raise CheckFailed("weights that were saved and loaded differ from the originals")
    return f"{len(names)} tensors, {size / 1e6:.1f} MB, equal bit for bit"
