"""What the report of a quickstart shows: headline, shortfalls, examples, curves, times, machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import polymodal
from polymodal.evaluation.examples import confusions, question_examples, retrieval_examples
from polymodal.evaluation.report_html import ReportData, duration
from polymodal.evaluation.scores import Report, Row
from polymodal.evaluation.tasks import QuestionsTask, RetrievalTask, TaskConfig
from polymodal.recipes.schema import Recipe
from polymodal.training.metrics_log import read_metrics


@dataclass(frozen=True, slots=True)
class Expected:
    """What a preset is expected to reach on held-out scenes; the report says where it does not.

    Args:
        overall: share of right answers over all families of the first task.
        family: the same for each family of it.
        novel: overall share of the task ``novel``.
        above_blind: by how much every family beats the same model without its media.
    """

    overall: float = 0.80
    family: float = 0.0
    novel: float = 0.0
    above_blind: float = 0.25


EXPECTED = {"scenes-full": Expected(overall=0.95, family=0.85, novel=0.80)}
"""By recipe name; others are held to the defaults."""

_SHOWN_SEARCHES = ("text to ", "image to ")


def report_data(
    recipe: Recipe,
    root: Path,
    measured: Sequence[tuple[TaskConfig, Path, Report]],
    seconds: Mapping[str, float],
    ask: Sequence[str],
) -> ReportData:
    """Everything the report shows.

    Args:
        recipe: what was trained.
        root: the quickstart's folder.
        measured: each task with its stored predictions and its report; questions first.
        seconds: wall time by step.
        ask: command lines that use the result.
    """
    scores = [report for _, _, report in measured]
    asked = next(stored for task, stored, _ in measured if isinstance(task, QuestionsTask))
    examples, mistakes = question_examples(asked)
    searches = [
        example
        for task, stored, _ in measured
        if isinstance(task, RetrievalTask) and task.title.startswith(_SHOWN_SEARCHES)
        for example in retrieval_examples(stored, num=1)
    ]
    return ReportData(
        title=recipe.name,
        headline=headline(recipe, scores, seconds),
        reports=scores,
        metrics=training_rows(root / "run"),
        examples=examples,
        mistakes=mistakes,
        confusions=confusions(asked),
        retrieval=searches,
        timings=seconds,
        environment=environment(),
        ask=ask,
        notes=notes(recipe.name, scores),
    )


def headline(recipe: Recipe, scores: Sequence[Report], seconds: Mapping[str, float]) -> str:
    """The result in one sentence."""
    main = _questions(scores)[0]
    modalities = sorted({stream.modality for stream in recipe.model.streams.values()} | {"text"})
    score, blind = main.overall.score, main.overall.controls.get("blind")
    without = f" (blind: {blind.value:.1%})" if blind is not None else ""
    asked = f"{score.value:.1%} right answers on {score.n:,} questions about held-out scenes{without}"
    took = duration(sum(seconds.values()))
    return f"From random weights to {asked}, with {len(modalities)} modalities ({', '.join(modalities)}), in {took}."


def notes(name: str, scores: Sequence[Report]) -> list[str]:
    """Where a run falls short of what is expected of its recipe; one sentence that says so if it does not.

    Args:
        name: the recipe's name.
        scores: what was measured.
    """
    expected = EXPECTED.get(name, Expected())
    main, *others = _questions(scores)
    found = []
    for report, goal in ((main, expected.overall), *((r, expected.novel) for r in others if r.task == "novel")):
        value = report.overall.score.value
        if value < goal:
            found.append(f"{report.task}: {value:.1%} right overall, below the {goal:.0%} expected of {name}.")
    low = [row for row in main.rows if row.score.value < expected.family]
    if low:
        listed = ", ".join(f"{_words(row)} ({row.score.value:.0%})" for row in low)
        found.append(f"Families of {main.task} below the {expected.family:.0%} expected: {listed}.")
    gains = {_words(row): gain for row in main.rows if (gain := above_blind(row)) is not None}
    weak = [f"{family} ({100 * gain:+.0f})" for family, gain in gains.items() if gain < expected.above_blind]
    if weak:
        points = f"{100 * expected.above_blind:.0f} points"
        found.append(f"Families of {main.task} less than {points} above their blind baseline: {', '.join(weak)}.")
    if not found and gains:
        margin = f"{100 * expected.above_blind:.0f} points above its blind baseline"
        found.append(
            f"{main.task}: at least {expected.overall:.0%} right as expected, and every family at least {margin} "
            f"(the least: {100 * min(gains.values()):.0f})."
        )
    return found


def _words(row: Row) -> str:
    return row.family.replace("_", " ")


def above_blind(row: Row) -> float | None:
    """How far a family's score lies above the same questions without media; None where that was not measured."""
    blind = row.controls.get("blind")
    return None if blind is None else row.score.value - blind.value


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The training logs of a run folder as the report takes them: one row per step with its losses by objective."""
    rows = []
    for path in sorted((run / "stages").glob("*/metrics.jsonl")):
        records = read_metrics(path)
        keys = {
            key for record in records for key, value in record.items() if isinstance(value, float) and _is_loss(key)
        }
        whole = {key for key in keys if "/" not in key}
        # One objective over several pairs or modalities: its parts, in as many colours as a chart has beside the total.
        shown = keys - whole if len(whole) == 1 and 2 <= len(keys - whole) <= 5 else whole
        for record in records:
            losses = {key.rpartition("/")[2]: value for key, value in record.items() if key in shown}
            total = sum(value for key, value in record.items() if key in whole)
            rows.append(
                {"stage": path.parent.name.partition("-")[2], "step": record["step"], "loss": total, "losses": losses}
            )
    return rows


def _is_loss(key: str) -> bool:
    return key not in ("grad_norm", "lr")


def environment() -> dict[str, str]:
    """Facts about the machine and the software that a time or a score depends on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {
        "polymodal": polymodal.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": f"{cores} usable, {torch.get_num_threads()} threads used by torch",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _questions(scores: Sequence[Report]) -> list[Report]:
    return [report for report in scores if report.use == "questions"]
