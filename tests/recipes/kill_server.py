"""Runs trainings in forked children and kills them; started by ``test_resume``, prints one JSON object.

Importing torch takes seconds, a fork takes none: this process imports once, and every attempt is a child of it.

Usage: ``python kill_server.py JOB.json`` with ``{"recipe": ..., "out": ..., "mode": "random" | "points", ...}``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401
from PIL import Image  # noqa: F401

from polymodal.data import feature_cache
from polymodal.recipes import run, run_folder
from polymodal.recipes.loading import load_recipe
from polymodal.training import atomic_folders, checkpoints, loop

PLACES = {
    "recipe written": (run, "claim"),
    "tokenizer saved": (run, "write_tokenizer"),
    "features written": (feature_cache, "_write_at"),
    "base saved": (loop, "save_base"),
    "checkpoint saved": (loop, "save_checkpoint"),
    "tensors written": (checkpoints, "write_tensors"),
    "folder renamed": (atomic_folders.os, "replace"),
    "metrics appended": (loop.MetricsLog, "append"),
    "stage weights saved": (run, "save_weights"),
    "checkpoints removed": (run, "_remove_checkpoints"),
    "recipe moved": (run_folder.Path, "replace"),
}
"""Functions before or after whose n-th call a child is killed."""


def child(job: dict[str, Any], point: list[Any] | None) -> int:
    """Fork a training; the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if point is not None:
            die_at(*point)
        run.train(load_recipe(job["recipe"]), job["out"], quiet=True)
    except Exception as error:  # noqa: BLE001 (a forked child must end here, whatever happened)
        Path(job["errors"]).write_text(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def die_at(place: str, when: str, number: int) -> None:
    """Let the ``number``-th call of a function be this process's last, before it or after it."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), [0]

    def wrapper(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def wait(pid: int, seconds: float | None) -> str:
    """Wait for a child, and kill it after some seconds: ``done``, ``killed`` or ``failed``."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG if deadline is not None else 0)
        if ended:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return "killed"
    return "done" if os.waitstatus_to_exitcode(status) == 0 else "failed"


def kill_at_random(job: dict[str, Any]) -> dict[str, Any]:
    """Runs, one after the other, killed at moments spread over a run's whole time, until ``kills`` have happened."""
    draw = random.Random(job["seed"])
    kills, runs = 0, 0
    outs: list[str] = []
    while kills < job["kills"] or not outs:
        out = f"{job['out']}-{runs}"
        runs += 1
        while True:
            is_enough = kills >= job["kills"]
            pid = child({**job, "out": out}, None)
            ended = wait(pid, None if is_enough else draw.uniform(0.0, 1.0) * job["seconds"])
            if ended == "failed":
                return {"failed": Path(job["errors"]).read_text()}
            if ended == "done":
                break
            kills += 1
        outs.append(out)
    return {"kills": kills, "outs": outs}


def kill_at_points(job: dict[str, Any]) -> dict[str, Any]:
    """One run, killed at every given place in turn; which places were met."""
    met = []
    for point in job["points"]:
        ended = wait(child(job, point), None)
        if ended == "failed":
            return {"failed": Path(job["errors"]).read_text(), "met": met}
        if ended == "killed":
            met.append(point)
    ended = wait(child(job, None), None)
    return {"met": met, "ended": ended, "errors": Path(job["errors"]).read_text() if ended == "failed" else ""}


def unbroken(job: dict[str, Any]) -> dict[str, Any]:
    """One run without a kill, and its time."""
    started = time.monotonic()
    ended = wait(child(job, None), None)
    failed = Path(job["errors"]).read_text() if ended == "failed" else ""
    return {"ended": ended, "failed": failed, "seconds": time.monotonic() - started}


def main() -> None:
    np.zeros(1)
    modes = {"random": kill_at_random, "points": kill_at_points, "unbroken": unbroken}
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results: list[Any] = []
    for job in jobs:
        if job["mode"] == "random":
            job["seconds"] = results[0]["seconds"]
        results.append(modes[job["mode"]](job))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
