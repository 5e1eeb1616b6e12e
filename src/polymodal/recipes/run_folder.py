"""The folder of a run: who may write to it, which recipe it holds, and how far it is."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.core.errors import CheckpointError
from polymodal.modalities.text import Tokenizer
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.model import RECIPE, TOKENIZER, WEIGHTS
from polymodal.recipes.schema import Recipe
from polymodal.recipes.tokenizers import write_tokenizer

_LOCK = ".lock"
_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO))
"""What a disk says when it takes no more."""


def claim(recipe: Recipe, folder: Path) -> None:
    """Write the recipe into a new folder, or prove that the folder holds a run of the same one.

    Raises:
        CheckpointError: if it holds another recipe, naming what differs, or something that is no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE
    if path.is_file():
        found = load_recipe(path)
        if found != recipe:
            raise CheckpointError(
                f"{folder}: holds a run of another recipe; {_difference(found.to_data(), recipe.to_data())}. "
                "Choose another --out, undo the change, or remove the folder"
            )
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the run's tokenizer, whole or not at all."""
    write_tokenizer(tokenizer, folder)


def is_finished(folder: Path) -> bool:
    """Whether the run's last file is there."""
    return (folder / WEIGHTS).is_file()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock ends with the process, however it ends.

    Raises:
        CheckpointError: if another process trains into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            f"{folder}: could not be written: {error}; free space, then run the same command again: it goes on from "
            "the last checkpoint"
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
