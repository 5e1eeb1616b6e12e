"""LLaVA-Instruct JSON: ``[{"id", "image", "conversations": [{"from", "value"}]}]`` -> conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.core.errors import DataError
from polymodal.core.parts import Image, Part, Text
from polymodal.core.samples import Message, Sample
from polymodal.data.importers.jsonfile import read_json
from polymodal.data.importers.report import ImportReport, PathLike, finish, image_folder, media_file, problem_with

MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def import_llava(src: PathLike, out: PathLike, *, images: PathLike | None = None) -> ImportReport:
    """Import LLaVA-Instruct.

    Every ``<image>`` in a human turn becomes the next image of ``image`` (a name or a list), and the line break beside
    it goes. An entry whose marks and images differ in number, or one of whose images is missing, is skipped.

    Args:
        src: the JSON file.
        out: the JSON Lines file to write.
        images: the folder that image names start from; by default ``images`` beside ``src``, or its folder.

    Raises:
        DataError: if ``src`` is no list, or nothing could be imported.
    """
    path = Path(src)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: found {type(entries).__name__}, expected a list of LLaVA entries")
    report = ImportReport()
    return finish(report, src, out, _samples(entries, image_folder(path, images), report))


def _samples(entries: list[Any], root: Path, report: ImportReport) -> Iterator[Sample]:
    for index, entry in enumerate(entries):
        name = f"entry {index}"
        if isinstance(entry, dict) and entry.get("id") is not None:
            name = str(entry["id"])
        try:
            messages = _messages(entry, root)
        except ValueError as error:
            report.skip(name, str(error))
            continue
        yield Sample(report.unique_id(name), messages)


def _messages(entry: Any, root: Path) -> tuple[Message, ...]:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list) or not entry["conversations"]:
        raise ValueError("has no conversations; expected a list of {from, value}")
    paths = _image_paths(entry.get("image"), root)
    turns = [_turn(turn, i) for i, turn in enumerate(entry["conversations"])]
    num_marks = sum(text.count(MARK) for role, text in turns if role == "user")
    if num_marks != len(paths):
        raise ValueError(f"{num_marks} {MARK} marks in human turns for {len(paths)} images")
    if any(MARK in text for role, text in turns if role != "user"):
        raise ValueError(f"a {MARK} mark outside the human turns")
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError("has no answer")
    left = iter(paths)
    return tuple(Message(role, _parts(text, left)) for role, text in turns)


def _image_paths(value: Any, root: Path) -> list[Path]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"image: found {value!r:.60}, expected a file name or a list of them")
    paths = [media_file(root, name) for name in names]
    for path in paths:
        if problem := problem_with(path):
            raise ValueError(problem)
    return paths


def _turn(turn: Any, index: int) -> tuple[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
        raise ValueError(f"turn {index}: expected 'from' (one of {', '.join(_ROLES)}) and a string 'value'")
    if not turn["value"].strip():
        raise ValueError(f"turn {index} is empty")
    return _ROLES[turn["from"]], turn["value"]


def _parts(text: str, images: Iterator[Path]) -> tuple[Part, ...]:
    pieces = text.split(MARK)
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        if i > 0:
            parts.append(Image(next(images)))
            piece = piece.removeprefix("\n")
        if i < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(Text(piece))
    return tuple(parts)
