"""Folders that appear whole or not at all, and that can be proved whole later.

A folder is written under a temporary name, each file flushed to the disk, a manifest with sizes and checksums last;
then it is renamed in one step. A kill at any moment leaves the folder as it was before, or as it is after, and at
most some ``.tmp-*``, ``.trash-*`` or ``.old-*`` folder that the next write removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1


def write_folder(
    folder: Path, name: str, content: Mapping[str, Callable[[Path], object]], facts: Mapping[str, Any]
) -> Path:
    """Write ``folder/name``; a folder of that name is replaced.

    Args:
        folder: made if absent.
        name: of the new folder.
        content: per file, what writes it to the path it is given.
        facts: put into the manifest.

    Raises:
        CheckpointError: if the disk refuses; what was there before is unharmed.
    """
    final, temporary, old = folder / name, folder / f".tmp-{name}", folder / f".old-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        temporary.mkdir()
        files = {}
        for file, write in content.items():
            write(temporary / file)
            _flush(temporary / file)
            files[file] = {"bytes": (temporary / file).stat().st_size, "sha256": _sha256(temporary / file)}
        manifest = {"format": _FORMAT, **facts, "files": files}
        manifest["checksum"] = _checksum(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(temporary / MANIFEST)
        _flush(temporary)
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        _flush(folder)
        remove_folder(old)
    except OSError as error:
        raise CheckpointError(
            f"{final}: could not be written: {error}; earlier checkpoints are unharmed. Free space or choose another "
            "folder, then run the same command again"
        ) from error
    return final


def _flush(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill on the way never leaves half of it under its name."""
    if path.exists():
        trash = path.parent / f".trash-{path.name}"
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(path, trash)
        shutil.rmtree(trash)


def _clean(folder: Path) -> None:
    """Remove what a kill left behind; an ``.old-`` folder only if its successor arrived, else it gets its name back."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(entry)
        elif entry.name.startswith(".old-"):
            final = folder / entry.name.removeprefix(".old-")
            if final.exists():
                remove_folder(entry)
            else:
                os.replace(entry, final)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        CheckpointError: saying only what is wrong with it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing: it was not written to its end") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} is not readable JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("checksum") != _checksum(manifest):
        raise CheckpointError(f"{MANIFEST} does not match its checksum")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(f"format {manifest['format']}, this version reads format {_FORMAT}")
    return manifest


def problem(path: Path) -> str | None:
    """What keeps a checkpoint (or base) folder from being used, or None if it is complete to the byte."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size:,} bytes, expected {facts['bytes']:,}"
        if _sha256(file) != facts["sha256"]:
            return f"{name} does not match its checksum"
    base = manifest.get("base")
    inner = problem(path.parent / base) if base else None
    return f"{base}: {inner}" if inner else None
