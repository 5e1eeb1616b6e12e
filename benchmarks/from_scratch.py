"""Trains recipes from random weights on ``scenes`` and measures each beside its baselines.

Usage: ``python -m benchmarks.from_scratch [RECIPE ...]`` trains the recipes (all of ``RECIPES`` if none is named) into
``runs/from-scratch/RECIPE``, measures the tasks that each names under ``evaluate``, puts its line into
``results/from-scratch.json`` in place of an older one, and writes ``docs/reference/from-scratch.md`` from that file.
A training that was interrupted goes on; one that is finished is only measured again. ``--page`` writes the page alone,
``--check`` fails if it is stale.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, machine

RECIPES = {
    "albef-scenes": "ALBEF: contrast with a momentum twin, then matching with hard negatives and masked words",
    "blip-scenes": "BLIP: one text encoder that is contrasted, matches with hard negatives, and writes captions",
    "vilt-scenes": "ViLT: matching and masked words in one transformer over words and patches",
    "flava-scenes": "FLAVA: contrast, matching, and masked words and patches, alone and together",
    "beit3-scenes": "BEiT-3: masked words and patches in a multiway transformer, and contrast",
    "blip2-scenes": "BLIP-2: a Q-Former by contrast, matching and captions, then before a frozen language model",
    "minigpt4": "MiniGPT-4: one linear map between BLIP-2's first stage and a language model that never met it",
}
"""Recipe -> what it trains, in a line."""
STORE = RESULTS / "from-scratch.json"
PAGE = ROOT / "docs" / "reference" / "from-scratch.md"
TIMES = "from-scratch-times.json"
SCENES = (6000, 400, 200)


def measure(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Train a recipe, or go on with its training, and measure its tasks; the line of the file."""
    import polymodal as pm
    from polymodal.recipes.evaluation import own_tasks
    from polymodal.recipes.loading import load_recipe

    recipe = load_recipe(name, [f"data_root={data}"])
    folder = out / recipe.name
    _train(recipe, folder)
    model = pm.load(folder)
    began = time.process_time()
    reports = []
    for number, task in enumerate(own_tasks(folder)):
        stored = folder / "predictions" / f"{number:02d}-{task.title}.jsonl"
        reports.append(pm.evaluate(model, task, predictions=stored).to_data())
    corpus = json.loads((data / "scenes.json").read_text(encoding="utf-8"))
    return {
        "recipe": recipe.name,
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.from_scratch {name}",
        "hardware": machine(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "corpus": {"version": corpus["version"], "scenes": corpus["scenes"]},
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "stages": {stage.name: stage.steps for stage in recipe.stages},
        "seconds": json.loads((folder / TIMES).read_text(encoding="utf-8"))
        | {"evaluation_cpu": round(time.process_time() - began, 1)},
        "tasks": reports,
    }


def _train(recipe: Any, folder: Path) -> None:
    """Train to the end; the seconds of all calls together stand in the run's folder."""
    from polymodal.recipes.run import train
    from polymodal.recipes.run_folder import is_finished

    times = folder / TIMES
    if is_finished(folder) and times.is_file():
        return
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        train(recipe, folder)
    finally:
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        before = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
        if (folder / "recipe.yaml").is_file():
            times.write_text(json.dumps({key: round(spent[key] + before.get(key, 0.0), 1) for key in spent}))


def merge(record: dict[str, Any], path: Path = STORE) -> dict[str, Any]:
    """Put a line into the file in place of an older one of its recipe; returns all of it."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held[record["recipe"]] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(dict(sorted(held.items())), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return held


def markdown(results: dict[str, Any]) -> str:
    """The page: how far each recipe stands above its best control, then every row of every task."""
    lines = [
        "# Trained from scratch",
        "",
        "Written by `python -m benchmarks.from_scratch`; do not edit it by hand.",
        "",
        "Small models of published forms, from random weights on the generated scenes, in CPU minutes. Scores are of",
        "the split `val`, whose scenes no training saw. What a control is, says [the guide](../guide/evaluation.md):",
        "*blind* lacks the medium, *shuffled* has another one's, *majority* and *chance* never look. The *margin* is",
        "the score less the best control, in points. It stands in brackets where the score's 95 % interval does not",
        "lie above that control, so that nothing is shown.",
        "",
        "| recipe | CPU minutes | parameters | rows with a clear margin | best margin | rows without one |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, record in results.items():
        rows = [(report, row) for report in record["tasks"] for row in _rows(report)]
        without = [f"{report['task']}: {row['family']}" for report, row in rows if not _is_clear(row)]
        lines.append(
            f"| [`{name}`](#{name}) | {record['seconds']['cpu'] / 60:.1f} | {record['parameters']:,} | "
            f"{len(rows) - len(without)} of {len(rows)} | {max(_margin(row) for _, row in rows):+.0f} | "
            f"{'; '.join(without) or 'none'} |"
        )
    for name, record in results.items():
        lines += ["", *_section(name, record)]
    return "\n".join(lines) + "\n"


def _section(name: str, record: dict[str, Any]) -> Iterator[str]:
    hardware = ", ".join(f"{key} {value}" for key, value in record["hardware"].items())
    stages = ", ".join(f"{stage} {steps:,}" for stage, steps in record["stages"].items())
    yield from (f"## {name}", "", f"{RECIPES.get(name, '').rstrip('.')}.", "")
    seconds, corpus = record["seconds"], record["corpus"]
    yield f"`{record['command']}`, {record['date']}: {seconds['cpu'] / 60:.1f} CPU minutes of training on"
    yield f"{record['threads']} thread ({seconds['wall'] / 60:.0f} by the clock). Updates: {stages}."
    yield f"Data: {corpus['scenes']['train']:,} scenes of version {corpus['version']}. Machine: {hardware}."
    for report in record["tasks"]:
        rows = _rows(report)
        controls = list(dict.fromkeys(key for row in rows for key in row["controls"]))
        further = list(dict.fromkeys(key for row in rows for key in row["metrics"]))
        columns = ["", "n", "score", "95 % interval", *controls, "margin", *further]
        yield from ("", f"**{report['task']}** ({report['use'].replace('_', ' ')})", "")
        yield f"| {' | '.join(columns)} |"
        yield f"| {' | '.join(['---'] * len(columns))} |"
        for row in rows:
            yield f"| {' | '.join(_cells(row, controls, further))} |"


def _cells(row: dict[str, Any], controls: list[str], further: list[str]) -> list[str]:
    score = row["score"]
    margin = f"{_margin(row):+.1f}" if _is_clear(row) else f"({_margin(row):+.1f})"
    cells = [row["family"], f"{score['n']:,}", f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}"]
    cells += [f"{row['controls'][key]['value']:.3f}" if key in row["controls"] else "" for key in controls]
    return [*cells, margin, *(f"{row['metrics'][key]:.3f}" if key in row["metrics"] else "" for key in further)]


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return report["rows"] if len(report["rows"]) == 1 else [*report["rows"], {**report["overall"], "family": "overall"}]


def _best_control(row: dict[str, Any]) -> float:
    return max((control["value"] for control in row["controls"].values()), default=0.0)


def _margin(row: dict[str, Any]) -> float:
    return float(100 * (row["score"]["value"] - _best_control(row)))


def _is_clear(row: dict[str, Any]) -> bool:
    return bool(row["score"]["low"] > _best_control(row))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", help=f"preset names or YAML files; without any: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/from-scratch"), help="where runs are")
    parser.add_argument("--data", type=Path, default=Path("data/scenes"), help="a corpus of scenes; made if absent")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--store", type=Path, default=STORE, help="the file of results")
    parser.add_argument("--page", action="store_true", help="train nothing; write the page from the results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is stale")
    asked = parser.parse_args(argv)
    if not asked.page and not asked.check:
        # Libraries read this when they are first imported, which nothing does before this point.
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)
        _run(asked.recipes or list(RECIPES), asked)
    page = markdown(json.loads(asked.store.read_text(encoding="utf-8")))
    if asked.check:
        is_stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page
        if is_stale:
            print(f"{PAGE}: is stale; run: python -m benchmarks.from_scratch --page", file=sys.stderr)
        return int(is_stale)
    if asked.store == STORE:
        PAGE.write_text(page, encoding="utf-8")
        print(f"written: {PAGE}")
    return 0


def _run(names: Sequence[str], asked: argparse.Namespace) -> None:
    import torch

    from polymodal.data.scenes import make_scenes

    torch.set_num_threads(asked.threads)
    if not (asked.data / "scenes.json").is_file():
        make_scenes(asked.data, *SCENES)
    for name in names:
        merge(measure(name, asked.data, asked.out), asked.store)
        print(f"measured: {name}")


if __name__ == "__main__":
    sys.exit(main())
