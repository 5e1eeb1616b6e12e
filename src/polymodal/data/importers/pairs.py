"""CSV tables whose columns are modalities -> view sets."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from polymodal.core.errors import ConfigError, DataError
from polymodal.core.parts import MODALITIES, Part, Text, media_part
from polymodal.core.samples import Sample
from polymodal.data.importers.report import ImportReport, PathLike, finish, media_file, problem_with

_LONGEST_FIELD = 10_000_000
_SAID = {"\t": "tab"}


def import_pairs(
    src: PathLike, out: PathLike, *, root: PathLike | None = None, delimiter: str | None = None
) -> ImportReport:
    """Import a CSV with a header row: one sample a row.

    Columns named by a modality are views (``text`` as it stands, others as file names), ``id`` and ``label`` are what
    they say, and every other column goes into ``meta`` as text. An empty cell is an absent view. Fields may be quoted.

    Args:
        src: the CSV file, UTF-8.
        out: the JSON Lines file to write.
        root: the folder that file names start from; by default that of ``src``.
        delimiter: what separates fields, one character or ``tab``; by default a tab for ``.tsv`` and a comma otherwise.

    Raises:
        ConfigError: if ``delimiter`` is something else.
        DataError: if ``src`` cannot be read, no column names a modality, or nothing could be imported.
    """
    path = Path(src)
    report = ImportReport()
    if delimiter is not None and delimiter != "tab" and len(delimiter) != 1:
        raise ConfigError(f"delimiter: found {delimiter!r}, expected one character, such as ; or the word tab")
    if delimiter is None:
        delimiter = "tab" if path.suffix.lower() == ".tsv" else ","
    separator = "\t" if delimiter == "tab" else delimiter
    return finish(report, src, out, _samples(path, Path(root) if root is not None else path.parent, separator, report))


def _samples(path: Path, root: Path, delimiter: str, report: ImportReport) -> Iterator[Sample]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            before = csv.field_size_limit(_LONGEST_FIELD)
            try:
                yield from _rows(csv.reader(file, delimiter=delimiter, strict=True), path, root, report)
            finally:
                csv.field_size_limit(before)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason})") from None


def _rows(reader: Iterator[list[str]], path: Path, root: Path, report: ImportReport) -> Iterator[Sample]:
    columns = [name.strip() for name in next(reader, [])]
    if not any(name in MODALITIES for name in columns) or len(set(columns)) != len(columns):
        other = [mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]]
        hint = (
            f"; do its fields end at {other[0]!r}? Say so: delimiter={_SAID.get(other[0], other[0])}" if other else ""
        )
        raise DataError(
            f"{path}: the header names the columns {columns}; expected distinct names, at least one of "
            f"{', '.join(MODALITIES)}{hint}"
        )
    row = 0
    while True:
        row += 1
        name = f"row {row}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.skip(name, f"is not valid CSV: {error}")
            continue
        if not fields:
            row -= 1
            continue
        if len(fields) != len(columns):
            report.skip(name, f"has {len(fields)} fields, the header names {len(columns)} columns")
            continue
        sample = _sample(dict(zip(columns, fields, strict=True)), name, root, report)
        if sample is not None:
            yield sample


def _sample(fields: dict[str, str], name: str, root: Path, report: ImportReport) -> Sample | None:
    views: dict[str, Part] = {}
    for modality in MODALITIES:
        value = fields.pop(modality, "")
        if not value.strip():
            continue
        if modality == "text":
            views[modality] = Text(value)
        elif problem := problem_with(file := media_file(root, value)):
            report.skip(name, f"{modality}: {problem}")
            return None
        else:
            views[modality] = media_part(modality, file)
    if not views:
        report.skip(name, "every view is empty")
        return None
    id = fields.pop("id", "").strip() or name
    label = fields.pop("label", "").strip() or None
    return Sample(report.unique_id(id), views=views, label=label, meta={k: v for k, v in fields.items() if v})
