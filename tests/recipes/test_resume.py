"""Kill a run at any moment, start it again: the weights are those of an unbroken run, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_recipes
from safetensors.numpy import load_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")

POINTS = [
    ("recipe moved", "before", 1),
    ("recipe written", "after", 1),
    ("tokenizer saved", "before", 1),
    ("tokenizer saved", "after", 1),
    ("features written", "after", 3),
    ("features written", "before", 40),
    ("features written", "after", 27),
    ("base saved", "before", 1),
    ("base saved", "after", 1),
    ("tensors written", "after", 1),
    ("metrics appended", "after", 1),
    ("checkpoint saved", "before", 1),
    ("checkpoint saved", "after", 1),
    ("tensors written", "before", 2),
    ("folder renamed", "before", 1),
    ("folder renamed", "after", 2),
    ("stage weights saved", "before", 1),
    ("stage weights saved", "after", 1),
    ("checkpoints removed", "before", 1),
    ("metrics appended", "after", 5),
    ("checkpoint saved", "before", 2),
    ("folder renamed", "after", 3),
    ("stage weights saved", "before", 1),
    ("stage weights saved", "after", 1),
    ("stage weights saved", "before", 1),
]


def demanding_recipe(root: Path) -> dict[str, Any]:
    """Everything that makes resuming hard: packs, a mix, dropout, adapters, cached features, bad samples, a choice."""
    small_recipes.write_data(root)
    (root / "4.png").write_bytes((root / "4.png").read_bytes()[:60])
    lines = small_recipes.read_lines(root / "questions.jsonl")
    lines[3]["messages"][0]["content"][0]["path"] = "absent.npy"
    small_recipes.write_lines(root / "questions.jsonl", lines)
    mix = [{"path": "captions.jsonl", "weight": 0.7}, {"path": "questions.jsonl", "weight": 0.3}]
    adapter = {"use": "lora", "rank": 2, "dropout": 0.2}
    connect = small_recipes.stage(
        "connect", train=["streams.*.connector", "backbone"], data=mix, cache_features=True, steps=6, save_every=2
    )
    adapt = small_recipes.stage(
        "adapt", train=[{"part": "backbone", "adapter": adapter}, "streams.image.encoder"], data=mix, steps=9,
        save_every=2, eval_every=4, validation="questions.jsonl", accumulate=2, optimizer={"use": "lion", "lr": 2.0e-3},
    )  # fmt: skip
    backbone = {"transformer": {"dropout": 0.1}}
    return small_recipes.decoder_recipe(root, connect, adapt, backbone=backbone, max_bad_rate=0.2)  # type: ignore[no-any-return]


def _serve(folder: Path, jobs: list[dict[str, Any]]) -> list[Any]:
    """Run the kill server; its process has one thread per pool, as have all its children."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([{**job, "errors": str(folder / "errors.txt")} for job in jobs]), encoding="utf-8")
    script = Path(__file__).with_name("kill_server.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _assert_same(out: Path, expected: Path) -> None:
    found, right = load_file(out / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == right.keys()
    different = [name for name in right if found[name].tobytes() != right[name].tobytes()]
    assert not different, f"{out.name}: {len(different)} of {len(right)} tensors differ, such as {different[:3]}"
    for stage in ("00-connect", "01-adapt"):
        name = f"stages/{stage}/metrics.jsonl"
        records = small_recipes.read_lines(out / name)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        assert records == small_recipes.read_lines(expected / name), f"{out.name}: {stage} logged other losses"
        assert not list((out / f"stages/{stage}").glob("*step-*")), "checkpoints of a finished stage are removed"
    bad = {record["id"] for record in small_recipes.read_lines(out / "quarantine.jsonl")}
    assert bad == {record["id"] for record in small_recipes.read_lines(expected / "quarantine.jsonl")} == {"c4", "q3"}


@pytest.mark.slow
def test_twenty_random_kills_and_one_at_every_dangerous_place_change_nothing(tmp_path: Path) -> None:
    recipe = demanding_recipe(tmp_path / "data")
    job = {"recipe": recipe, "out": str(tmp_path / "unbroken")}
    jobs = [
        {**job, "mode": "unbroken"},
        {**job, "mode": "points", "out": str(tmp_path / "points"), "points": POINTS},
        {**job, "mode": "random", "out": str(tmp_path / "random"), "kills": 20, "seed": 7},
    ]
    unbroken, points, randomly = _serve(tmp_path, jobs)
    assert unbroken["ended"] == "done", unbroken
    assert "failed" not in points and points["ended"] == "done", points
    missed = [point for point in map(list, POINTS) if point not in points["met"]]
    assert not missed, f"these places were never reached: {missed}"
    _assert_same(tmp_path / "points", tmp_path / "unbroken")
    assert "failed" not in randomly, randomly
    assert randomly["kills"] >= 20
    for out in randomly["outs"]:
        _assert_same(Path(out), tmp_path / "unbroken")
