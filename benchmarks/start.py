"""How long until something happens: imports, ``--help``, loading a model, its first answer. Each in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from benchmarks import harness, shapes

LOAD = """
import sys, time
started = time.perf_counter()
import polymodal as pm
model = pm.load(sys.argv[1])
loaded = time.perf_counter()
next(model.stream("What is it?", pm.Image(sys.argv[2]), max_new_tokens=8), "")
print(loaded - started, time.perf_counter() - loaded)
"""
BARE = "python -c pass"


def process(*arguments: str) -> Callable[[], harness.Timed]:
    """A case that runs Python once; its processor time is the child's."""

    def run() -> harness.Timed:
        before, started = os.times(), time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=harness.ROOT)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return harness.Timed(1.0, time.perf_counter() - started, used)

    return run


def write_run(folder: Path, quick: bool) -> None:
    """A run folder with random weights: what ``pm.load`` takes."""
    from polymodal.recipes.assemble import assemble
    from polymodal.recipes.loading import dump_recipe, load_recipe
    from polymodal.training.weights import save_weights

    width, depth = (32, 2) if quick else (384, 12)
    vit = {"width": width, "depth": depth, "heads": 2 if quick else 6}
    backbone = shapes.DECODERS["2M" if quick else "47M"][0]
    model = shapes.vision_recipe(64 if quick else 224, 16, vit, {"use": "mlp"}, backbone)
    recipe = load_recipe({"name": "start", "model": model})
    parts = assemble(recipe, shapes.tokenizer(512))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    parts.tokenizer.save(folder / "tokenizer.json")
    save_weights(parts.network, folder / "model.safetensors")


def milliseconds(rows: Sequence[harness.Row]) -> list[list[str]]:
    """Median and range of each case in milliseconds, and what it takes beyond starting Python."""
    bare = float(np.median(rows[0].seconds))
    table = []
    for row in rows:
        times = sorted(1e3 * seconds for seconds in row.seconds)
        median = float(np.median(times))
        cpu = float(np.median([1e3 * seconds for seconds in row.cpu_seconds]))
        spread = f"{times[0]:.0f} - {times[-1]:.0f}"
        table.append([row.name, f"{median:.0f}", spread, f"{median - 1e3 * bare:.0f}", f"{cpu:.0f}"])
    return table


def run(options: harness.Options) -> harness.Result:
    """Measure."""
    cases = {
        BARE: process("-c", "pass"),
        "import polymodal": process("-c", "import polymodal"),
        "polymodal --help": process("-m", "polymodal.apps.cli", "--help"),
    }
    if not options.quick:
        cases["import torch"] = process("-c", "import torch")
    rows = harness.interleave(cases, options.repeat)
    result = harness.Result("start", "Time to start")
    result.add_table(
        "Whole processes", ["case", "median ms", "range", "beyond python, ms", "CPU ms"], milliseconds(rows)
    )
    help_s = float(np.median(next(row for row in rows if row.name == "polymodal --help").seconds))
    found = round(help_s, 3)
    result.goals.append(harness.Goal("polymodal --help, seconds", "< 0.3", found, found < 0.3))
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder) / "run", options.quick)
        photo = Path(folder) / "photo.png"
        PIL.Image.fromarray(np.full((240, 320, 3), 90, np.uint8)).save(photo)
        command = [sys.executable, "-c", LOAD, str(Path(folder) / "run"), str(photo)]
        times = []
        for _ in range(1 if options.quick else options.repeat + 1):
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=harness.ROOT)
            times.append([float(word) for word in done.stdout.split()])
        size = (Path(folder) / "run" / "model.safetensors").stat().st_size / 1e6
    measured = np.asarray(times[1:] or times).T * 1e3
    names = ("import torch, build and load the model", "then: first piece of the first answer, with a picture")
    pairs = zip(names, measured, strict=True)
    table = [[name, f"{np.median(ms):.0f}", f"{ms.min():.0f} - {ms.max():.0f}"] for name, ms in pairs]
    result.add_table(f"pm.load and the first answer ({size:.0f} MB of weights)", ["case", "median ms", "range"], table)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = harness.parse_options(__doc__, argv, repeat=7)
    run(options).finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
