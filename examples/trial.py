"""What every example does the same way: read its options, run its seeds, print and keep its table.

An example is a function ``run_seed(folder, seed, quick) -> {row: score}``, the rows of its table and its claims. Rows
and claims are written down before the run; a claim that does not hold is printed as such.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import polymodal as pm
from polymodal.core.config import load_yaml

HERE = Path(__file__).parent
Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Claim:
    """Something the scores should show.

    Args:
        text: the claim, with its number.
        holds: the test, on scores.
        on_mean: whether it is put to the mean over the seeds, as for controls at chance, where few clusters of inputs
            meet few answers and a single seed is lumpy. Otherwise it must hold in every seed.
    """

    text: str
    holds: Callable[[Scores], bool]
    on_mean: bool = False

    def check(self, scores: Sequence[Scores]) -> bool:
        """Whether the claim holds for the scores of all seeds."""
        if self.on_mean:
            return self.holds({name: float(np.mean([one[name] for one in scores])) for name in scores[0]})
        return all(self.holds(one) for one in scores)


@dataclass(frozen=True, slots=True)
class Example:
    """One example.

    Args:
        name: its name.
        title: what it shows, in a line.
        rows: in the table's order, what each score is.
        claims: what must hold.
        run_seed: trains and measures; given an empty folder, the seed, and whether to be quick.
    """

    name: str
    title: str
    rows: Mapping[str, str]
    claims: Sequence[Claim]
    run_seed: Callable[[Path, int, bool], dict[str, float]]


def train(recipe: str, folder: Path, arm: str, seed: int, overrides: Sequence[str] = ()) -> pm.Model:
    """Train one arm of an example: a recipe beside this file, on the data in ``folder``, with overrides."""
    out = folder / "runs" / arm
    settings = [f"data_root={folder}", f"seed={seed}", *overrides]
    pm.train(str(HERE / recipe), out, settings, quiet=True)
    return pm.load(out)


def with_streams(recipe: str, names: Sequence[str], enters: str = "merge") -> str:
    """The override that leaves a recipe only these streams, each entering as stated and without modality dropout."""
    streams = load_yaml((HERE / recipe).read_text(encoding="utf-8"), recipe)["model"]["streams"]
    return "model.streams=" + json.dumps({name: {**streams[name], "enters": enters} for name in names})


def accuracy(model: pm.Model, samples: Sequence[pm.Sample]) -> float:
    """Share of samples whose likeliest class is their label."""
    found, _ = model.classify(samples)
    return float(np.mean([name == sample.label for name, sample in zip(found, samples, strict=True)]))


def average(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The mean of several tables of probabilities."""
    return np.mean(np.stack(rows), axis=0)


def main(example: Example, argv: Sequence[str] | None = None) -> int:
    """Run an example as a command; the exit status is 1 if a claim does not hold (never with ``--quick``)."""
    parser = argparse.ArgumentParser(description=example.title)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to run (default 3)")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, not what it learns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep data and runs here (default: a temporary folder)")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error("--seeds: expected at least 1")
    root = options.out or Path(tempfile.mkdtemp(prefix=f"{example.name}-"))
    started, cpu_started = time.perf_counter(), time.process_time()
    scores = []
    try:
        for seed in range(options.seeds):
            folder = root / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            scores.append(example.run_seed(folder, seed, options.quick))
            print(f"seed {seed} done after {time.perf_counter() - started:.0f} s", file=sys.stderr)
    finally:
        if options.out is None:
            shutil.rmtree(root, ignore_errors=True)
    seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu_started}
    result = summary(example, scores, quick=options.quick, seconds=seconds)
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if options.quick or all(claim["holds"] for claim in result["claims"]) else 1


def summary(
    example: Example, scores: Sequence[Scores], *, quick: bool, seconds: Mapping[str, float]
) -> dict[str, object]:
    """All scores and claims as plain data."""
    rows = []
    for name, text in example.rows.items():
        values = [round(float(one[name]), 4) for one in scores]
        mean = round(float(np.mean(values)), 4)
        rows.append({"row": name, "what": text, "mean": mean, "min": min(values), "max": max(values), "scores": values})
    claims = [{"claim": claim.text, "holds": claim.check(scores)} for claim in example.claims]
    return {
        "example": example.name,
        "title": example.title,
        "seeds": len(scores),
        "quick": quick,
        "seconds": {clock: round(value, 1) for clock, value in seconds.items()},
        "rows": rows,
        "claims": claims,
    }


def table(result: dict[str, object]) -> str:
    """The summary for people."""
    rows = list(result["rows"])
    width = max(len(row["what"]) for row in rows)
    lines = [str(result["title"]), "", f"{'':{width}}  mean   range"]
    lines += [f"{row['what']:{width}}  {row['mean']:.3f}  {row['min']:.3f} - {row['max']:.3f}" for row in rows]
    lines += ["", *(f"{'holds ' if claim['holds'] else 'FAILS '} {claim['claim']}" for claim in result["claims"])]
    kind = " (quick: the scores mean nothing)" if result["quick"] else ""
    seconds = result["seconds"]
    return "\n".join(
        [*lines, "", f"{result['seeds']} seeds, {seconds['cpu']:.0f} CPU s, {seconds['wall']:.0f} s{kind}"]
    )
