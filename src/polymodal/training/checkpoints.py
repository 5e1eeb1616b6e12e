"""Checkpoints that are whole or not there, whatever happens while they are written.

A run's checkpoint folder holds::

    step-00000123/  weights.safetensors  state.safetensors  state.json  manifest.json
    base-5f0c.../   weights.safetensors  manifest.json        (frozen weights, once per stage)
    .tmp-*  .trash-*  .old-*                                  (left by a kill; removed by the next save)

:mod:`polymodal.training.atomic_folders` says how they are written. Only one process may write to a folder.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.core.errors import CheckpointError
from polymodal.core.patterns import nearest
from polymodal.training.atomic_folders import problem, read_manifest, remove_folder, write_folder
from polymodal.training.state_files import hash_tensors, join_state, read_tensors, split_state, write_tensors

_LOG = logging.getLogger(__name__)
_WEIGHTS, _STATE, _STATE_DATA = "weights.safetensors", "state.safetensors", "state.json"
_STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")


class Keep(Config):
    """Which checkpoints stay.

    Args:
        last: how many of the newest.
        best: also the one with the lowest (``min``) or highest (``max``) metric; None: no such one.
    """

    last: int = Field(default=2, ge=1)
    best: Literal["min", "max"] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A complete checkpoint.

    Args:
        path: its folder.
        step: updates done when it was written.
        metric: what it was judged by, if it was.
        skipped: newer ones that are incomplete or damaged, as ``(path, reason)``.
    """

    path: Path
    step: int
    metric: float | None = None
    skipped: tuple[tuple[Path, str], ...] = ()


@dataclass(slots=True)
class Checkpoint:
    """What a checkpoint holds: weights by name (frozen ones of its base included) and the state tree."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    metric: float | None = None
    base: str | None = None


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    step: int,
    *,
    base: str | None = None,
    metric: float | None = None,
    keep: Keep | None = None,
) -> Path:
    """Write ``folder/step-<step>``, then remove what ``keep`` does not ask for.

    Args:
        folder: the run's checkpoint folder; made if absent.
        weights: the trained weights, or all of them if there is no base.
        state: nested numbers, text, arrays and tensors: optimizer, loader position, random states, counters.
        step: updates done.
        base: what :func:`save_base` returned for the frozen weights.
        metric: what :attr:`Keep.best` judges by; None or not finite: never the best.
        keep: which ones stay, this one included; default: the last two.

    Raises:
        CheckpointError: if the disk refuses or the state holds what cannot be stored; earlier checkpoints are unharmed.
    """
    data, tensors = split_state(dict(state))
    content: dict[str, Callable[[Path], object]] = {
        _WEIGHTS: lambda path: write_tensors(path, weights),
        _STATE: lambda path: write_tensors(path, tensors),
        _STATE_DATA: lambda path: path.write_text(json.dumps(data, allow_nan=False), encoding="utf-8"),
    }
    is_judged = metric is not None and math.isfinite(metric)
    facts = {"step": step, "metric": metric if is_judged else None, "base": base}
    path = write_folder(Path(folder), f"step-{step:08d}", content, facts)
    _prune(Path(folder), keep or Keep(), base)
    return path


def save_base(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Write frozen weights once; the name of their folder, which follows from names and content.

    Raises:
        CheckpointError: if the disk refuses.
    """
    name = f"base-{hash_tensors(weights)[:16]}"
    if problem(Path(folder) / name) is not None:
        write_folder(Path(folder), name, {_WEIGHTS: lambda path: write_tensors(path, weights)}, {})
    return name


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Folders named after a step, newest first; the predecessor of a half-done replacement only if it has none."""
    found: dict[int, Path] = {}
    for entry in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        match = _STEP.fullmatch(entry.name)
        if match:
            found.setdefault(int(match[1]), entry)
    return sorted(found.items(), reverse=True)


def latest(folder: Path) -> Found | None:
    """The newest complete checkpoint of ``folder``; None if there is none.

    Incomplete and damaged ones on the way are skipped, logged as warnings and named in the result.
    """
    skipped: list[tuple[Path, str]] = []
    for step, path in _step_folders(Path(folder)):
        reason = problem(path)
        if reason is None:
            return Found(path, step, read_manifest(path)["metric"], tuple(skipped))
        _LOG.warning("checkpoint %s skipped: %s", path, reason)
        skipped.append((path, reason))
    return None


def best(folder: Path, mode: Literal["min", "max"]) -> Found | None:
    """The complete checkpoint with the best metric, the newest of equals; None if none has one."""
    judged = [found for found in _readable(Path(folder)) if found.metric is not None]
    for found in sorted(judged, key=lambda found: (_rank(found, mode), -found.step)):
        if problem(found.path) is None:
            return found
    return None


def _rank(found: Found, mode: str) -> float:
    assert found.metric is not None
    return found.metric if mode == "min" else -found.metric


def _readable(folder: Path) -> list[Found]:
    """Every checkpoint with a sound manifest, newest first; the files themselves are not read."""
    result = []
    for step, path in _step_folders(folder):
        try:
            result.append(Found(path, step, read_manifest(path)["metric"]))
        except CheckpointError:
            continue
    return result


def _prune(folder: Path, keep: Keep, base: str | None) -> None:
    found = _readable(folder)
    kept = found[: keep.last]
    judged = [one for one in found if one.metric is not None]
    if keep.best and judged:
        kept = [*kept, min(judged, key=lambda one: (_rank(one, str(keep.best)), -one.step))]
    paths = {one.path for one in kept}
    bases = {base, *(read_manifest(one.path)["base"] for one in kept)}
    try:
        for one in found:
            if one.path not in paths:
                remove_folder(one.path)
        for entry in sorted(folder.glob("base-*")):
            if entry.name not in bases:
                remove_folder(entry)
    except OSError as error:
        _LOG.warning("an old checkpoint in %s could not be removed: %s", folder, error)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking it to the byte.

    Raises:
        CheckpointError: if it is missing, incomplete or damaged.
    """
    path = Path(path)
    reason = problem(path)
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}; expected a complete checkpoint, use the newest one that is")
    manifest = read_manifest(path)
    weights = read_tensors(path.parent / manifest["base"] / _WEIGHTS) if manifest["base"] else {}
    weights.update(read_tensors(path / _WEIGHTS))
    data = json.loads((path / _STATE_DATA).read_text(encoding="utf-8"))
    state = join_state(data, read_tensors(path / _STATE))
    return Checkpoint(manifest["step"], weights, state, manifest["metric"], manifest["base"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Copy weights into a model whose names and shapes are exactly theirs.

    Raises:
        CheckpointError: listing what is missing, unexpected (with the nearest name) and of another shape; the model
            is unchanged then.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    problems = [f"missing {name}" for name in missing]
    for name, tensor in weights.items():
        if name not in own:
            near = nearest(name, missing, 1)
            problems.append(f"unexpected {name}" + (f" (nearest missing: {near[0]})" if near else ""))
        elif own[name].shape != tensor.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the model {list(own[name].shape)}")
    if problems:
        rest = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        shown = "\n  ".join([*problems[:10], *rest])
        raise CheckpointError(
            f"{source}: the weights do not fit the model, found {len(weights)} tensors, expected {len(own)}:\n"
            f"  {shown}\nBuild the model from the recipe that stands in the run folder, its adapters included"
        )
    model.load_state_dict(dict(weights))
