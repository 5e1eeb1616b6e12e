"""The whole way in one call: corpus, training, evaluation with controls, search, and a report that shows it all.

A folder ``OUT`` afterwards holds ``data/`` (the corpus), ``run/`` (what ``pm.load`` and ``polymodal ask`` take),
``predictions/`` (every answer, for re-scoring), ``report.html`` and ``report.json``. Each step is skipped when its
result is there already, so that the same call goes on where an earlier one stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Media, Part, Text
from polymodal.data.scenes import make_scenes
from polymodal.evaluation.report_html import ReportData, write_report
from polymodal.evaluation.scores import Report, read_predictions, rescore
from polymodal.evaluation.tasks import QuestionsTask, RetrievalTask, TaskConfig, read_samples
from polymodal.models.heads.table import ProjectionConfig
from polymodal.recipes.evaluation import evaluate, resolve_task
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.model import Model
from polymodal.recipes.quickstart_report import report_data
from polymodal.recipes.run import train
from polymodal.recipes.run_folder import WEIGHTS
from polymodal.recipes.schema import Recipe
from polymodal.recipes.stored_models import load_assembly

Say = Callable[[str], None]
"""Takes one line for the person who waits."""
Advance = Callable[[str, int, int], None]
"""Called as ``advance(what, done, total)``."""
Measured = tuple[TaskConfig, Path, Report]
"""A task, its stored predictions, and what they score."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a quickstart makes and measures.

    Args:
        num_train: scenes to train on; num_val: held-out scenes; num_novel: scenes with colour-shape pairs never seen.
        per_family: questions per family that the model is asked with everything there.
        per_control: questions per family and control that asks the model.
        searched: lines of ``views`` that search is measured on, a fifth of them of each medium.
    """

    num_train: int = 6000
    num_val: int = 400
    num_novel: int = 200
    per_family: int = 100
    per_control: int = 40
    searched: int = 1000


SIZES = {
    "quickstart": Sizes(),
    "scenes-full": Sizes(num_train=12_000, num_val=500, num_novel=300, per_family=300, per_control=100),
}
"""The sizes of each preset; other recipes take those of ``quickstart``."""

_BATCH = 256
_FEWER = ("full", "blind", "majority", "wording")
_TIMINGS = "timings.json"


@dataclass(slots=True)
class QuickstartResult:
    """What a quickstart left behind.

    Args:
        out: the folder; report: the HTML file; run: the model's folder.
        scores: what was measured, questions first.
        headline: the result in one sentence.
        ask: command lines that ask the model about real files of the corpus.
        seconds: wall time by step, over all calls that this folder took.
    """

    out: Path
    report: Path
    run: Path
    scores: list[Report]
    headline: str
    ask: list[str]
    seconds: dict[str, float] = field(default_factory=dict)


def run_quickstart(
    out: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    preset: str = "quickstart",
    sizes: Sizes | None = None,
    say: Say | None = None,
    advance: Advance | None = None,
    quiet: bool = False,
    command: str = "polymodal",
) -> QuickstartResult:
    """Make the corpus, train a preset on it from random weights, measure it, and write the report.

    Args:
        out: the folder; an interrupted one is gone on with.
        overrides: ``key.sub=value`` changes to the recipe.
        preset: a preset whose data paths are those of a scenes corpus.
        sizes: how much to make and measure; None takes the preset's entry of :data:`SIZES`.
        say: told what begins.
        advance: told how far a step is.
        quiet: show no training progress.
        command: how the ask lines call the program.

    Raises:
        ConfigError: if an override does not fit the recipe, or the recipe cannot be asked questions.
        CheckpointError: if the folder holds a run of another recipe.
        DataError: if it holds a corpus of other sizes.
    """
    root = Path(out)
    sizes = sizes or SIZES.get(preset, SIZES["quickstart"])
    recipe = load_recipe(preset, overrides).model_copy(update={"data_root": str(root / "data")})
    tasks = _tasks(recipe, root, sizes)
    clock = _Clock(root / _TIMINGS)
    say = say or (lambda line: None)
    say(f"1/4 corpus: {sizes.num_train:,} scenes to train on, {sizes.num_val:,} held out, {sizes.num_novel:,} novel")
    with clock.step("make the corpus"):
        _make_corpus(root / "data", sizes, advance)
    say(f"2/4 training {recipe.name}: {', '.join(f'{stage.name} {stage.steps:,}' for stage in recipe.stages)} steps")
    _train(recipe, root / "run", clock, quiet)
    say(f"3/4 measuring: {', '.join(task.title for task in tasks)}")
    measured = _measure(root, tasks, clock, advance)
    say("4/4 writing the report")
    ask = ask_lines(root, command)
    data = report_data(recipe, root, measured, clock.seconds, ask)
    report = write_report(root / "report.html", data)
    _write_json(root / "report.json", recipe, data)
    return QuickstartResult(root, report, root / "run", list(data.reports), data.headline, ask, clock.seconds)


def _make_corpus(folder: Path, sizes: Sizes, advance: Advance | None) -> None:
    def told(done: int, total: int) -> None:
        if advance is not None:
            advance("rendering scenes", done, total)

    num_scenes = sizes.num_train + sizes.num_val + sizes.num_novel
    # Starting processes takes longer than rendering a few scenes.
    processes = len(os.sched_getaffinity(0)) if num_scenes >= 1000 else 1
    make_scenes(folder, sizes.num_train, sizes.num_val, sizes.num_novel, processes=processes, progress=told)


def _train(recipe: Recipe, folder: Path, clock: _Clock, quiet: bool) -> None:
    started = time.perf_counter()
    result = train(recipe, folder, quiet=quiet)
    elsewhere = time.perf_counter() - started
    for name, stage in result.stages.items():
        clock.add(f"train: {name}", stage.seconds)
        elsewhere -= stage.seconds
    clock.add("train: tokenizer, feature cache, files", elsewhere)


def _tasks(recipe: Recipe, root: Path, sizes: Sizes) -> list[TaskConfig]:
    """The recipe's own tasks, with our limits where it states none, and the searches its shared space allows."""
    limits: dict[str, Any] = {"limit": sizes.per_family, "control_limit": sizes.per_control, "batch_size": _BATCH}
    tasks: list[TaskConfig] = []
    for entry in recipe.evaluate:
        is_questions = entry.get("use", "questions") == "questions"
        # The first task has every control; those after it the cheap ones.
        fewer = {"conditions": _FEWER} if any(isinstance(task, QuestionsTask) for task in tasks) else {}
        defaults = {**limits, **fewer} if is_questions else {}
        tasks.append(resolve_task({**defaults, **entry}, root / "data"))
    if not any(isinstance(task, QuestionsTask) for task in tasks):
        raise ConfigError(
            f"recipe {recipe.name!r}: 'evaluate' holds no questions task; add "
            "{use: questions, name: val, data: val/questions.jsonl}"
        )
    return tasks + _search_tasks(recipe, root / "data" / "val", sizes)


def _search_tasks(recipe: Recipe, split: Path, sizes: Sizes) -> list[TaskConfig]:
    spaces = [head for head in recipe.model.heads.values() if isinstance(head, ProjectionConfig)]
    modalities = [recipe.model.streams[name].modality for head in spaces[:1] for name in head.streams]
    pairs = [("text", name) for name in modalities if name != "text" and "text" in modalities]
    tasks: list[TaskConfig] = [
        RetrievalTask(
            name=f"{query} to {target}", data=str(split / "views.jsonl"), query=query, target=target,
            positives="label", limit=sizes.searched, batch_size=_BATCH,
        )
        for one, other in pairs
        for query, target in ((one, other), (other, one))
    ]  # fmt: skip
    if {"image", "video"} <= set(modalities):
        # Never paired in training: what is found here was bound through the words.
        tasks.append(
            RetrievalTask(
                name="image to video, never paired", data=str(split / "hub.jsonl"), query="image", target="video",
                limit=sizes.searched // 5, batch_size=_BATCH,
            )
        )  # fmt: skip
    return tasks


def _measure(root: Path, tasks: Sequence[TaskConfig], clock: _Clock, advance: Advance | None) -> list[Measured]:
    """Run every task whose predictions are not there yet, or are older than the weights."""
    weights = root / "run" / WEIGHTS
    model: _Remembering | None = None
    measured = []
    for task in tasks:
        stored = root / "predictions" / f"{task.title.replace(' ', '_').replace(',', '')}.jsonl"
        if not _is_current(stored, task, weights):
            with clock.step(f"measure: {task.title}" if isinstance(task, QuestionsTask) else "measure: search"):
                model = model or _Remembering(root / "run")
                evaluate(model, task, predictions=stored, progress=_named(advance, task.title))
        measured.append((task, stored, rescore(stored)))
    return measured


def _named(advance: Advance | None, title: str) -> Advance | None:
    if advance is None:
        return None
    return lambda condition, done, total: advance(f"{title}: {condition.replace('_', ' ')}", done, total)


def _is_current(stored: Path, task: TaskConfig, weights: Path) -> bool:
    if not stored.is_file() or stored.stat().st_mtime < weights.stat().st_mtime:
        return False
    return bool(read_predictions(stored)[0]["task"] == task.to_data())


class _Remembering(Model):
    """A model that embeds no part twice: every search asks for the same texts and files again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_assembly(folder))
        self._known: dict[str, NDArray[np.float32]] = {}

    def embed(
        self, parts: Sequence[Part | str], batch_size: int = 64, stream: str | None = None
    ) -> NDArray[np.float32]:
        """See :meth:`Model.embed`."""
        keys = [f"{stream}:{_key(part)}" for part in parts]
        fresh = {key: part for key, part in zip(keys, parts, strict=True) if key not in self._known}
        if fresh:
            self._known.update(zip(fresh, super().embed(list(fresh.values()), batch_size, stream), strict=True))
        return np.stack([self._known[key] for key in keys])


def _key(part: Part | str) -> str:
    if isinstance(part, Media):
        return f"{part.modality}:{part.name}"
    return f"text:{part.text if isinstance(part, Text) else part}"


def ask_lines(root: Path, command: str = "polymodal") -> list[str]:
    """One command line per set of media that a held-out question needs, about the first files of ``data/val``."""
    lines: dict[tuple[str, ...], str] = {}
    for sample in read_samples(root / "data" / "val" / "questions.jsonl"):
        media = sample.media()
        kind = tuple(part.modality for part in media)
        if kind not in lines:
            words = [str(root / "run"), *(part.name for part in media), sample.messages[0].text]
            lines[kind] = f"{command} ask {' '.join(map(shlex.quote, words[:-1]))} {_quoted(words[-1])}"
    return [lines[kind] for kind in sorted(lines, key=len)]


def _quoted(question: str) -> str:
    return f'"{question}"' if not set(question) & set('"$`\\!') else shlex.quote(question)


class _Clock:
    """Wall seconds by step; kept in a file, so that a report after a resume knows the earlier steps' times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add(self, name: str, seconds: float) -> None:
        """Add to a step's time."""
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        _replace(self._path, json.dumps(self.seconds, indent=1) + "\n")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block; one that fails counts as well."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)


def _write_json(path: Path, recipe: Recipe, data: ReportData) -> None:
    """All scores with their baselines, the times and the machine, for machines."""
    content = {
        "recipe": recipe.name,
        "headline": data.headline,
        "notes": list(data.notes),
        "reports": [report.to_data() for report in data.reports],
        "seconds": dict(data.timings),
        "seconds_in_all": round(sum(data.timings.values()), 3),
        "environment": dict(data.environment),
        "ask": list(data.ask),
    }
    _replace(path, json.dumps(content, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
