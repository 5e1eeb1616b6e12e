"""check, train, evaluate and presets."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text

from polymodal.apps.output import console, emit_json, emit_table, say
from polymodal.core.errors import ConfigError
from polymodal.evaluation.scores import Report, Row
from polymodal.recipes.check import CheckReport, Proof, check_recipe
from polymodal.recipes.evaluation import evaluate as measure
from polymodal.recipes.evaluation import own_tasks, resolve_task
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import RunResult
from polymodal.recipes.run import train as train_recipe
from polymodal.recipes.run_folder import WEIGHTS
from polymodal.recipes.stored_models import load

_STYLES = {"ok": "green", "failed": "bold red", "skipped": "dim"}


def check(recipe: str, overrides: list[str], *, as_json: bool) -> None:
    """Prove a recipe; one line per proof as it is done. Exits with 1 if one does not hold."""
    loaded = load_recipe(recipe, overrides)
    if as_json:
        report = check_recipe(loaded)
        emit_json(report.to_data())
    else:
        report = check_recipe(loaded, _print_proof)
        say(_verdict(report))
    if not report.is_ok:
        sys.exit(1)


def _print_proof(proof: Proof) -> None:
    """A line of the table: status, place, proof, figure."""
    screen = console()
    line = Text.assemble(
        (f"{proof.status:<8}", _STYLES[proof.status]), (f"{proof.where:<16}", "dim"), f"{proof.name:<39}", proof.figure
    )
    screen.print(line, soft_wrap=True)


def _verdict(report: CheckReport) -> str:
    held = sum(proof.status == "ok" for proof in report.proofs)
    if report.is_ok:
        return f"{report.recipe}: all {held} proofs hold"
    return f"{report.recipe}: {len(report.failed)} of {held + len(report.failed)} proofs do not hold"


def train(recipe: str, overrides: list[str], out: Path | None, *, as_json: bool) -> None:
    """Train a recipe, or resume its run."""
    loaded = load_recipe(recipe, overrides)
    if out is None and Path(loaded.name).name != loaded.name:
        raise ConfigError(f"name: found {loaded.name!r}, expected the name of a folder below runs; or give --out")
    folder = out or Path("runs") / loaded.name
    started = time.perf_counter()
    result = train_recipe(loaded, folder, quiet=as_json)
    seconds = time.perf_counter() - started
    if as_json:
        emit_json(_run_data(result, seconds))
        return
    if result.was_finished:
        return
    rows = [
        (name, f"{stage.steps:,}", f"{stage.num_samples:,}", f"{stage.seconds:.1f}", _last_losses(stage.losses))
        for name, stage in result.stages.items()
    ]
    emit_table("stages trained now", ("stage", "steps", "samples", "seconds", "last losses"), rows)
    say(f"{folder}: finished in {seconds:.1f} s; ask it: polymodal ask {folder} FILE... QUESTION")


def _last_losses(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if "/" not in name)


def _run_data(result: RunResult, seconds: float) -> dict[str, Any]:
    stages = {
        name: {
            "steps": stage.steps,
            "losses": stage.losses,
            "tokens": stage.num_tokens,
            "samples": stage.num_samples,
            "seconds": round(stage.seconds, 3),
            "best_step": stage.best_step,
            "validation": stage.validation,
            "predicted_seconds": None if stage.cost is None else round(stage.cost.total_s, 3),
        }
        for name, stage in result.stages.items()
    }
    return {
        "out": result.out,
        "model": result.out / WEIGHTS,
        "was_finished": result.was_finished,
        "bad_samples": result.num_bad_samples,
        "seconds": round(seconds, 3),
        "stages": stages,
    }


def evaluate(
    model: Path, tasks: list[str], out: Path | None, limit: int | None, device: str | None, *, as_json: bool
) -> None:
    """Measure a model on tasks, or on those of its recipe, beside its baselines."""
    parsed = [resolve_task(task) for task in tasks] or own_tasks(model)
    if limit is not None:
        parsed = [task.model_copy(update={"limit": limit}) for task in parsed]
    loaded = load(model, device)
    reports = []
    for number, task in enumerate(parsed):
        stored = None if out is None else out / f"{number:02d}-{task.title}.jsonl"
        report = measure(loaded, task, predictions=stored)
        reports.append(report)
        if not as_json:
            _print_report(report)
    if as_json:
        emit_json({"model": model, "tasks": [report.to_data() for report in reports]})
    elif out is not None:
        say(f"predictions are in {out}; they can be scored again without the model")


def _print_report(report: Report) -> None:
    rows = [*report.rows] if len(report.rows) == 1 else [*report.rows, replace(report.overall, family="overall")]
    controls = list(dict.fromkeys(name for row in rows for name in row.controls))
    further = list(dict.fromkeys(name for row in rows for name in row.metrics))
    columns = (report.use, "n", "score", "95 % interval", *controls, *further)
    emit_table(report.task, columns, [_cells(row, controls, further) for row in rows])
    for error in report.errors[:5]:
        say(f"could not be answered: {error}")
    if len(report.errors) > 5:
        say(f"and {len(report.errors) - 5} more")


def _cells(row: Row, controls: list[str], further: list[str]) -> list[str]:
    score = row.score
    cells = [row.family, str(score.n), f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}"]
    cells += [f"{row.controls[name].value:.3f}" if name in row.controls else "" for name in controls]
    return cells + [f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in further]
