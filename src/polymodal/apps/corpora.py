"""data make, data import and data inspect."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from polymodal.apps.output import Bar, emit_json, emit_table, key_values, say
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.data.digits import make_digits
from polymodal.data.importers import IMPORTERS
from polymodal.data.inspect import Inspection, Problem, inspect_source
from polymodal.data.scenes import make_scenes

CORPORA: dict[str, Callable[..., dict[str, Any]]] = {"scenes": make_scenes, "digits": make_digits}
"""The embedded corpora by the name that ``polymodal data make`` takes."""

_MOST_PROBLEMS = 10


def make(corpus: str, out: Path, options: list[str], *, as_json: bool) -> None:
    """Generate a corpus."""
    maker = _entry(CORPORA, "corpus", corpus)
    given = _options(maker, options, f"corpus {corpus}", hidden=("out", "progress"))
    with Bar(is_silent=as_json) as bar:
        summary = maker(out, **given, progress=lambda done, total: bar(f"making {corpus}", done, total))
    if as_json:
        emit_json({"out": out, **summary})
        return
    counts = summary.get("scenes") or summary.get("counts") or {}
    emit_table(f"{corpus} in {out}", ["part", "number"], [[name, f"{number:,}"] for name, number in counts.items()])
    say(f"Look at one: polymodal data inspect {next(iter(sorted(out.glob('*.jsonl'))), out / 'train/views.jsonl')}")


def bring(format: str, source: Path, out: Path, options: list[str], *, as_json: bool) -> None:
    """Import a known layout."""
    importer = _entry(IMPORTERS, "format", format)
    given = _options(importer, options, f"format {format}", hidden=("src", "out"))
    report = importer(source, out, **given)
    if as_json:
        emit_json({"out": out, **report.to_data()})
        return
    renamed = f", {report.renamed:,} renamed because their id was taken" if report.renamed else ""
    say(f"wrote {report.written:,} samples to {out}{renamed}")
    if report.skipped:
        _list_some(f"{len(report.skipped):,} items were left out", ["item", "reason"], report.skipped)


def inspect(data: Path, *, decode: bool, as_json: bool) -> None:
    """Show what a data file holds and what is broken in it."""
    found = inspect_source(data, decode=decode)
    if as_json:
        emit_json({**found.to_data(), "is_clean": found.is_clean})
        return
    kinds = {"conversations": found.conversations, "view sets": found.view_sets, "labelled": found.labelled}
    kinds |= {f"{role} turns": count for role, count in found.turns.items()}
    emit_table(
        f"{found.path}: {found.samples:,} samples", ["what", "number"], [[k, f"{n:,}"] for k, n in kinds.items() if n]
    )
    if found.modalities:
        rows = [
            [name, f"{count:,}", f"{found.items.get(name, 0):,}" if name != "text" else "",
             f"{found.files.get(name, 0):,}" if name != "text" else ""]
            for name, count in found.modalities.items()
        ]  # fmt: skip
        emit_table("modalities", ["modality", "samples with it", "items", "files"], rows)
    spreads = [
        [f"{modality} {measure}", *(_number(value) for value in (spread.min, spread.median, spread.max))]
        for modality, sizes in found.sizes.items()
        for measure, spread in sizes.items()
    ]
    spreads += [
        [f"characters, {who}", *(_number(value) for value in (spread.min, spread.median, spread.max))]
        for who, spread in found.text_chars.items()
    ]
    if spreads:
        emit_table("sizes", ["measure", "smallest", "median", "largest"], spreads)
    _problems(found)


def capfilt(
    data: Path,
    out: Path,
    captioner: Path | None,
    judge: Path,
    sampling: dict[str, Any],
    options: dict[str, Any],
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Caption and filter pairs."""
    from polymodal.inference.sampling import Sampling
    from polymodal.recipes.capfilt import capfilt as run
    from polymodal.recipes.stored_models import load

    drawn = Sampling.parse(sampling)
    filtering = load(judge, device)
    writing = None if captioner is None else filtering if captioner == judge else load(captioner, device)
    with Bar(is_silent=as_json) as bar:
        report = run(
            data,
            out,
            writing,
            filtering,
            sampling=drawn,
            progress=lambda done, total: bar("judging", done, total),
            **options,
        )
    if as_json:
        emit_json(report.to_data())
        return
    rows = [
        [origin, f"{report.kept.get(origin, 0):,}", f"{report.dropped.get(origin, 0):,}"]
        for origin in ("original", "synthetic")
        if origin in report.kept or origin in report.dropped
    ]
    emit_table(f"{out}: {report.num_written:,} pairs", ["text", "kept", "dropped"], rows)
    what = {"matching": "chance that it fits", "similarity": "similarity"}[report.judged_by]
    say(f"kept from a {what} of {report.threshold:.3f} on; {len(report.skipped):,} samples could not be used")


def _problems(found: Inspection) -> None:
    for name, problems in (("malformed", found.malformed), ("missing", found.missing), ("broken", found.broken)):
        if problems:
            _list_some(f"{name}: {len(problems):,}", ["sample", "item", "reason"], map(_cells, problems))
    if found.duplicate_ids:
        _list_some(f"ids used twice: {len(found.duplicate_ids):,}", ["id", "samples"], found.duplicate_ids.items())
    if found.is_clean:
        how = "every file decoded" if found.decoded else "headers only; --decode reads every file whole"
        say(f"nothing malformed, missing, broken or doubled ({how})")


def _cells(problem: Problem) -> tuple[str, str, str]:
    return problem.sample, problem.item, problem.reason


def _list_some(title: str, columns: list[str], rows: Iterable[Any]) -> None:
    listed = list(rows)
    emit_table(title, columns, listed[:_MOST_PROBLEMS])
    if len(listed) > _MOST_PROBLEMS:
        say(f"... and {len(listed) - _MOST_PROBLEMS:,} more; --json lists all")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _entry(table: dict[str, Callable[..., Any]], kind: str, name: str) -> Callable[..., Any]:
    if name not in table:
        raise ConfigError(unknown(kind, name, table))
    return table[name]


def _options(function: Callable[..., Any], options: list[str], what: str, hidden: tuple[str, ...]) -> dict[str, Any]:
    """The ``key=value`` options as keyword arguments of ``function``.

    Raises:
        ConfigError: if one is not of its parameters, or one that it needs is not given.
    """
    given = key_values(options)
    parameters = {name: p for name, p in signatures.signature(function).parameters.items() if name not in hidden}
    for name in given:
        if name not in parameters:
            raise ConfigError(f"{what}: {unknown('option', name, parameters)}")
    needed = [name for name, p in parameters.items() if p.default is signatures.Parameter.empty and name not in given]
    if needed:
        raise ConfigError(f"{what}: needs {', '.join(f'{name}=...' for name in needed)}")
    for name, value in given.items():
        default = parameters[name].default
        # bool is an int to Python; num_train=true is still a mistake.
        if isinstance(default, int | float) and (type(value) is bool) != (type(default) is bool):
            raise ConfigError(f"{what}: {name}: found {value!r}, expected a value like {default!r}")
        if type(default) is int and type(value) is not int:
            raise ConfigError(f"{what}: {name}: found {value!r}, expected a whole number")
    return {
        name: str(value) if _is_path(parameters[name]) and value is not None else value for name, value in given.items()
    }


def _is_path(parameter: signatures.Parameter) -> bool:
    return "PathLike" in str(parameter.annotation)
