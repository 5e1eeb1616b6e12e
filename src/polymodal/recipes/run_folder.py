"""The folder of a run: who may write to it, which recipe it holds, and how far it is."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.core.errors import CheckpointError
from polymodal.core.locks import lock
from polymodal.modalities.text import Tokenizer
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.schema import Recipe
from polymodal.recipes.tokenizers import TOKENIZER, remove_tokenizers

RECIPE = "recipe.yaml"
WEIGHTS = "model.safetensors"
STAGES = "stages"
QUARANTINE = "quarantine.jsonl"
_LOCK = ".lock"
_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO))
"""What a disk says when it takes no more."""


def claim(recipe: Recipe, folder: Path) -> None:
    """Write the recipe into a new folder, or prove that the folder holds a run of the same one.

    A run that stopped before its first update is begun anew with the new recipe: whoever mends a recipe runs the same
    command again.

    Raises:
        CheckpointError: if it holds another recipe, naming what differs, or something that is no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE
    if path.is_file():
        found = load_recipe(path)
        if found == recipe:
            return
        if (folder / STAGES).exists() or is_finished(folder):
            raise CheckpointError(
                f"{folder}: holds a run of another recipe; {_difference(found.to_data(), recipe.to_data())}. "
                "Choose another --out, undo the change, or remove the folder"
            )
        remove_tokenizers(folder)
        (folder / QUARANTINE).unlink(missing_ok=True)
        _write(path, dump_recipe(recipe))
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in (_LOCK, _partial(path).name))
    if foreign:
        raise CheckpointError(
            f"{folder}: is not empty and holds no {RECIPE}; found {', '.join(foreign[:3])}, expected a new folder or "
            "one that 'polymodal train' wrote; choose another --out"
        )
    _write(path, dump_recipe(recipe))


def run_tokenizer(folder: Path) -> Tokenizer | None:
    """The run's tokenizer; None if it has none yet."""
    return Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks of a finished run's files."""
    return [name for name in (RECIPE, TOKENIZER, WEIGHTS) if not (folder / name).is_file()]


def is_finished(folder: Path) -> bool:
    """Whether the run's last file is there."""
    return (folder / WEIGHTS).is_file()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock ends with the process, however it ends.

    Raises:
        CheckpointError: if another process trains into the folder.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file, expected a folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as file:
        try:
            lock(file)
        except OSError:
            raise CheckpointError(
                f"{folder}: another process trains into this folder; wait for its end, or choose another --out"
            ) from None
        yield


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses into an error that says how to go on.

    Raises:
        CheckpointError: if the disk is full or may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise CheckpointError(
            f"{folder}: could not be written: {error}; free space or make it writable, then run the same command "
            "again: it goes on from the last checkpoint"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write(path: Path, text: str) -> None:
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _difference(old: Any, new: Any, place: str = "") -> str:
    """The first place where two plain values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *new):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            if left != right:
                name = left.get("name", index) if isinstance(left, dict) else index
                return _difference(left, right, f"{place}.{name}")
    return f"{place or 'recipe'} is {str(old)[:80]} there and {str(new)[:80]} here"
