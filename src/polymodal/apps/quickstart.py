"""quickstart: from nothing to a report, on the generated corpus of scenes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from polymodal.apps.output import Bar, emit_json, emit_table, say
from polymodal.core.errors import ConfigError
from polymodal.evaluation.report_html import duration
from polymodal.evaluation.scores import Report
from polymodal.recipes.quickstart import QuickstartResult, Sizes, run_quickstart

_SHOWN = ("blind", "shuffled", "majority", "wording")


def run(out: Path, overrides: list[str], preset: str, scenes: str | None, *, as_json: bool) -> None:
    """Run the quickstart and say what came out."""
    with Bar(is_silent=as_json) as bar:
        result = run_quickstart(
            out,
            overrides,
            preset=preset,
            sizes=parse_sizes(scenes),
            say=None if as_json else say,
            advance=bar,
            quiet=as_json,
            command=program(),
        )
    if as_json:
        emit_json(
            {
                "headline": result.headline,
                "report": result.report,
                "run": result.run,
                "scores": {score.task: score.overall.score.value for score in result.scores},
                "seconds": result.seconds,
                "ask": result.ask,
            }
        )
        return
    _show(result)


def _show(result: QuickstartResult) -> None:
    for score in result.scores:
        if score.use == "questions":
            say("")
            emit_table(*score_table(score))
    say("")
    say(result.headline)
    say(f"Report: {result.report}   ({duration(sum(result.seconds.values()))} in all)")
    say("Ask it:")
    for line in result.ask:
        say(f"  {line}")


def score_table(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of a questions report: each family beside its controls, in percent."""
    controls = [name for name in _SHOWN if any(name in row.controls for row in report.rows)]
    has_less = any(name.startswith("without") for row in report.rows for name in row.controls)
    rows = []
    for row in (*report.rows, report.overall):
        cells = [row.family.replace("_", " "), f"{100 * row.score.value:.1f}"]
        cells += [f"{100 * row.controls[name].value:.1f}" if name in row.controls else "" for name in controls]
        if has_less:
            less = {name.removeprefix("without_"): s.value for name, s in row.controls.items() if "without" in name}
            is_family = row is not report.overall
            cells.append(", ".join(f"{name} {100 * value:.0f}" for name, value in less.items()) if is_family else "")
        rows.append([*cells, str(row.score.n)])
    columns = ["family", "score", *controls, *(["without"] if has_less else []), "n"]
    return f"{report.task}: percent right, beside the controls", columns, rows


def parse_sizes(scenes: str | None) -> Sizes | None:
    """``TRAIN,VAL,NOVEL`` as sizes; None takes those of the preset.

    Raises:
        ConfigError: if it is not three counts.
    """
    if scenes is None:
        return None
    counts = scenes.split(",")
    if len(counts) != 3 or not all(count.strip().isdigit() and int(count) > 0 for count in counts):
        raise ConfigError(
            f"--scenes: found {scenes!r}, expected three counts above zero: TRAIN,VAL,NOVEL, as in 4000,400,200"
        )
    return Sizes(*map(int, counts))


def program() -> str:
    """How the shell finds this program: its name, or its path where the name would find none or another one."""
    script = Path(sys.executable).with_name("polymodal")
    found = shutil.which("polymodal")
    if not script.exists() or (found is not None and Path(found).resolve() == script.resolve()):
        return "polymodal"
    near = os.path.relpath(script)
    return str(script) if near.startswith("..") else near
