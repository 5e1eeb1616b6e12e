"""Distillation, consolidation and pruning as parts of a run: they act, resume, and leave nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import torch
from safetensors.torch import load_file

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Image
from polymodal.recipes.check import check_recipe
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import train
from polymodal.recipes.stored_models import load
from polymodal.training import loop

FAST = {"use": "adamw", "lr": 0.01}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"), num=12)


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    wide = {"transformer": {"width": 24}}
    stage = small_recipes.stage(steps=6, optimizer=FAST)
    train(load_recipe(small_recipes.decoder_recipe(data, stage, backbone=wide)), folder, quiet=True)
    return folder


def student(root: Path, teacher: Path, **stage: Any) -> dict[str, Any]:
    objectives = {
        "place": {"use": "distill", "teacher": str(teacher), "match": "features"},
        "likeness": {"use": "distill", "teacher": str(teacher), "match": "similarity", "weight": 0.5},
    }
    changes = {
        "train": ["streams.*.encoder", "heads.space"], "data": ["views.jsonl"], "objectives": objectives,
        "batch": {"samples": 8}, "optimizer": FAST, "steps": 20,
    }  # fmt: skip
    recipe: dict[str, Any] = small_recipes.decoder_recipe(root, small_recipes.stage(**{**changes, **stage}))
    recipe["model"]["tokenizer"] = {"use": "file", "path": str(teacher / "tokenizer.json")}
    return recipe


def test_a_student_learns_from_a_teacher_that_is_never_saved(data: Path, teacher: Path, tmp_path: Path) -> None:
    objectives = {"distill": {"teacher": str(teacher), "temperature": 2.0}}
    train_all = ["streams.image", "backbone"]
    recipe = load_recipe(
        student(data, teacher, train=train_all, steps=30, data=["captions.jsonl"], objectives=objectives)
    )
    report = check_recipe(recipe)
    assert report.is_ok, report.failed
    result = train(recipe, tmp_path / "run", quiet=True)
    lines = small_recipes.read_lines(tmp_path / "run" / "stages" / "00-tune" / "metrics.jsonl")
    assert lines[-1]["distill"] < 0.7 * lines[0]["distill"]
    names = set(load_file(tmp_path / "run" / "model.safetensors"))
    assert names <= set(load(tmp_path / "run").network.state_dict()), "the student's alone"
    assert result.stages["tune"].steps == 30


def test_two_ways_of_learning_from_one_teacher(data: Path, teacher: Path, tmp_path: Path) -> None:
    train(load_recipe(student(data, teacher)), tmp_path / "run", quiet=True)
    lines = small_recipes.read_lines(tmp_path / "run" / "stages" / "00-tune" / "metrics.jsonl")
    assert all(lines[-1][name] < lines[0][name] for name in ("place", "likeness"))


def test_distilling_from_batches_of_conversations_and_view_sets(data: Path, teacher: Path, tmp_path: Path) -> None:
    objectives = {
        "says": {"use": "distill", "teacher": str(teacher)},
        "place": {"use": "distill", "teacher": str(teacher), "match": "features"},
    }
    data_of = ["captions.jsonl", "views.jsonl"]
    train_all = ["streams.*.encoder", "streams.image.connector", "backbone", "heads.space.projs"]
    recipe = student(data, teacher, train=train_all, data=data_of, objectives=objectives, batch={"samples": 6})
    report = check_recipe(load_recipe(recipe))
    assert report.is_ok, report.failed
    train(load_recipe(recipe), tmp_path / "run", quiet=True)
    lines = small_recipes.read_lines(tmp_path / "run" / "stages" / "00-tune" / "metrics.jsonl")
    assert all(lines[-1][name] < 0.7 * lines[0][name] for name in ("says", "place"))


def test_a_teacher_that_reads_otherwise_is_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    recipe = student(data, teacher)
    other = copy.deepcopy(recipe)
    other["model"]["tokenizer"] = {"use": "bpe", "vocab_size": 270}
    report = check_recipe(load_recipe(other))
    assert any("has another tokenizer than the model; expected the same" in proof.figure for proof in report.failed)
    other = copy.deepcopy(recipe)
    del other["model"]["streams"]["sensor"]
    with pytest.raises(ConfigError, match="has the stream 'sensor', the model has"):
        train(load_recipe(other), tmp_path / "a", quiet=True)
    with pytest.raises(ConfigError, match="a teacher reads the media; leave grad_cache and cache_features out"):
        load_recipe(student(data, teacher, cache_features=True))


def two_tasks(data: Path, weight: float | None, steps: int = 12) -> dict[str, Any]:
    """Captions of images first, then questions about sensor windows."""
    objectives: dict[str, Any] = {"next_token": 1.0}
    if weight is not None:
        objectives["ewc"] = {"stage": "old", "weight": weight, "samples": 8}
    return small_recipes.decoder_recipe(  # type: ignore[no-any-return]
        data,
        small_recipes.stage(
            "old", train=["streams.image.connector", "backbone"], data=["captions.jsonl"], steps=steps, optimizer=FAST
        ),
        small_recipes.stage(
            "new", train=["streams.sensor.connector", "backbone"], data=["questions.jsonl"], steps=steps,
            optimizer=FAST, objectives=objectives, save_every=4,
        ),
    )  # fmt: skip


def caption_loss(run: Path, data: Path) -> float:
    model = load(run)
    samples = small_recipes.read_lines(data / "captions.jsonl")[:6]
    losses = []
    for line in samples:
        said = line["messages"][1]["content"]
        image = line["messages"][0]["content"][0]["path"]
        logits = torch.from_numpy(model.logits([Image(data / image), "What is it?"]))[-1]
        first = model.tokenizer.encode(said)[0]
        losses.append(float(-logits.log_softmax(0)[first]))
    return float(np.mean(losses))


def test_consolidation_keeps_the_old_task_and_its_weights(data: Path, tmp_path: Path) -> None:
    assert check_recipe(load_recipe(two_tasks(data, 100.0))).is_ok
    moved, lost = {}, {}
    for name, weight in (("plain", None), ("kept", 1e4)):
        train(load_recipe(two_tasks(data, weight)), tmp_path / name, quiet=True)
        stages = tmp_path / name / "stages"
        before = load_file(stages / "00-old" / "weights.safetensors")
        after = load_file(stages / "01-new" / "weights.safetensors")
        moved[name] = sum(float((after[key] - before[key]).square().sum()) for key in after)
        lost[name] = caption_loss(tmp_path / name, data)
        assert not list(stages.rglob("fisher*")), "the estimate of a complete stage is removed"
    assert moved["kept"] < 0.7 * moved["plain"]
    assert lost["kept"] < lost["plain"]
    line = small_recipes.read_lines(tmp_path / "kept" / "stages" / "01-new" / "metrics.jsonl")
    assert line[0]["ewc"] == 0.0 and line[-1]["ewc"] > 0.0


@pytest.mark.parametrize("kind", ["ewc", "prune"])
def test_an_interrupted_stage_goes_on_to_the_same_weights(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = two_tasks(data, 50.0 if kind == "ewc" else None)
    if kind == "prune":
        recipe["stages"][1]["prune"] = {"sparsity": 0.5, "every": 3}
    train(load_recipe(recipe), tmp_path / "whole", quiet=True)
    step = loop.StageRun._one_step

    def dies(self: Any, micro: Any) -> Any:
        if self.context.stage.name == "new" and self.step == 6:
            raise KeyboardInterrupt
        return step(self, micro)

    monkeypatch.setattr(loop.StageRun, "_one_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe), tmp_path / "broken", quiet=True)
    if kind == "ewc":
        assert len(list((tmp_path / "broken").rglob("fisher-0.safetensors"))) == 1
    monkeypatch.setattr(loop.StageRun, "_one_step", step)
    train(load_recipe(recipe), tmp_path / "broken", quiet=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_pruning_is_reported_and_proven(data: Path, tmp_path: Path) -> None:
    stage = small_recipes.stage(steps=8, prune={"sparsity": 0.6, "scope": "global", "every": 2})
    recipe = load_recipe(small_recipes.decoder_recipe(data, stage))
    assert check_recipe(recipe).is_ok
    result = train(recipe, tmp_path / "run", quiet=True).stages["tune"]
    assert result.sparsity == pytest.approx(0.6, abs=0.01)
    lines = small_recipes.read_lines(tmp_path / "run" / "stages" / "00-tune" / "metrics.jsonl")
    shares = [line["sparsity"] for line in lines]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(0.6, abs=0.01)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    zeros = sum(int((w == 0).sum()) for name, w in weights.items() if name.endswith("_proj.weight"))
    total = sum(w.numel() for name, w in weights.items() if name.endswith("_proj.weight") and "backbone" in name)
    assert zeros / total > 0.5


def test_messages(data: Path) -> None:
    recipe = two_tasks(data, 1.0)
    recipe["stages"][1]["objectives"]["ewc"]["stage"] = "new"
    failed = check_recipe(load_recipe(recipe)).failed
    assert any("ewc.stage: found 'new', expected a stage before this one, of ['old']" in p.figure for p in failed)
    with pytest.raises(ConfigError, match="'validation' could choose weights from before 'prune' was done"):
        stage = small_recipes.stage(prune={"sparsity": 0.5}, validation="captions.jsonl", eval_every=2)
        load_recipe(small_recipes.decoder_recipe(data, stage))
