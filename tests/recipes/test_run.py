"""A run folder: what it holds, who may write to it, and that its model is the one that was trained."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import torch
from safetensors.torch import load_file

from polymodal.core.errors import CheckFailed, CheckpointError, ConfigError, DataError
from polymodal.core.parts import Image
from polymodal.models.adapters import adapter_names, use_adapters
from polymodal.recipes import api, run_folder
from polymodal.recipes import run as module
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.model import Model
from polymodal.recipes.run import train
from polymodal.recipes.stored_models import load
from polymodal.training import checkpoints
from polymodal.training.metrics_log import MetricsLog
from polymodal.training.progress import Progress

LORA = {"part": "backbone", "adapter": {"use": "lora", "rank": 2}}


class Notes(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"), num=12)


def short_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    return small_recipes.decoder_recipe(root, small_recipes.stage(steps=2), **changes)  # type: ignore[no-any-return]


def test_the_loaded_model_computes_what_the_trained_one_computes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters merged, tied weights, tokenizer and preprocessing included."""
    kept: list[Any] = []
    assemble = module.assemble
    monkeypatch.setattr(module, "assemble", lambda *args: kept.append(assemble(*args)) or kept[-1])
    recipe = small_recipes.decoder_recipe(
        root, small_recipes.stage(steps=2), small_recipes.stage("adapt", train=[LORA], steps=3)
    )
    result = train(load_recipe(recipe), tmp_path / "run", quiet=True)
    assert list(result.stages) == ["tune", "adapt"] and not result.was_finished
    loaded = load(tmp_path / "run")
    assert loaded.recipe == load_recipe(recipe) == load_recipe(tmp_path / "run" / "recipe.yaml")
    prompt = [Image(root / "0.png"), "What is it?"]
    found, right = loaded.logits(prompt), Model(kept[0]).logits(prompt)
    assert np.array_equal(found, right)
    assert not any("lora" in name for name in loaded.network.state_dict())


def test_merging_adapters_keeps_what_the_adapted_model_computes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[Any] = []
    prompt = [Image(root / "1.png"), "What is it?"]
    merge = module.finish_train

    def watched(network: Any, *rest: Any) -> Any:
        assert any(bool(p.any()) for name, p in network.named_parameters() if name.endswith("lora_b"))
        network.eval()
        before.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return merge(network, *rest)

    monkeypatch.setattr(module, "finish_train", watched)
    stage = small_recipes.stage(train=[LORA], steps=3, optimizer={"use": "adamw", "lr": 0.01})
    train(load_recipe(small_recipes.decoder_recipe(root, stage)), tmp_path / "run", quiet=True)
    loaded = load(tmp_path / "run")
    merged = loaded.logits(prompt)
    state = loaded.network.state_dict()
    tail = ".adapters.default.lora_"
    names = [name.removesuffix(f"{tail}a") for name in before[0] if name.endswith(f"{tail}a")]
    assert names
    for name in names:
        low = before[0][f"{name}{tail}b"] @ before[0][f"{name}{tail}a"] * (16.0 / 2)
        assert torch.equal(state[f"{name}.weight"], before[0][f"{name}.weight"] + low)
        state[f"{name}.weight"].copy_(before[0][f"{name}.weight"])
    assert np.abs(loaded.logits(prompt) - merged).max() > 1e-4, "without the adapters it computes something else"


def test_adapters_that_stay_are_loaded_resumed_and_act_beside_each_other(root: Path, tmp_path: Path) -> None:
    prompt = {"part": "backbone", "adapter": {"use": "prompt", "tokens": 2}, "name": "first"}
    tone = {"part": "backbone", "adapter": {"use": "lora", "rank": 2, "match": ["*.q_proj"]}, "merge": False}
    gains = {"part": "backbone", "adapter": {"use": "ia3", "inputs": ["*.down_proj"]}, "name": "gains", "merge": False}
    fast = {"use": "adamw", "lr": 0.05}
    recipe = small_recipes.decoder_recipe(
        root,
        small_recipes.stage("one", train=[prompt, tone], steps=2, optimizer=fast),
        small_recipes.stage("two", train=[gains], steps=2, optimizer=fast),
    )
    train(load_recipe(recipe), tmp_path / "run", quiet=True)
    loaded = load(tmp_path / "run")
    assert set(adapter_names(loaded.network)) == {"first", "gains", "default"}
    asked = [Image(root / "1.png"), "What is it?"]
    said, logits = loaded.chat(*asked, max_new_tokens=6), loaded.logits(asked)
    assert loaded.chat(*asked, max_new_tokens=6).tokens == said.tokens, "with the prefix cache"
    (tmp_path / "run" / "model.safetensors").unlink()
    result = train(load_recipe(recipe), tmp_path / "run", quiet=True)
    assert not result.stages, "both stages were complete"
    assert np.array_equal(load(tmp_path / "run").logits(asked), logits)
    for name in adapter_names(loaded.network):
        use_adapters(loaded.network, [other for other in adapter_names(loaded.network) if other != name])
        assert np.abs(loaded.logits(asked) - logits).max() > 1e-4, name


def test_a_finished_run_called_again_does_nothing_and_says_so(root: Path, tmp_path: Path) -> None:
    recipe, progress = load_recipe(short_recipe(root)), Notes()
    train(recipe, tmp_path / "run", quiet=True)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = train(recipe, tmp_path / "run", progress=progress)
    assert result.was_finished and not result.stages
    assert progress.notes == [
        f"{tmp_path / 'run'}: this run is finished; there is nothing to do. "
        f"Its model is {tmp_path / 'run' / 'model.safetensors'}"
    ]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == times


def test_a_recipe_that_failed_before_its_first_update_may_be_mended(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="no parameter or module matches 'backbon'"):
        train(load_recipe(short_recipe(root), ["stages.tune.train=[backbon]"]), out, quiet=True)
    (out / "quarantine.jsonl").touch()
    tokenizers = [file.read_bytes() for file in out.glob("tokenizer*.json")]
    smaller = ["model.tokenizer.vocab_size=270"]
    assert train(load_recipe(short_recipe(root), smaller), out, quiet=True).stages["tune"].steps == 2
    assert load_recipe(out / "recipe.yaml").model.tokenizer.vocab_size == 270
    assert [file.read_bytes() for file in out.glob("tokenizer*.json")] != tokenizers
    assert not (out / "quarantine.jsonl").exists()


def test_a_folder_of_another_recipe_is_refused_and_the_difference_named(root: Path, tmp_path: Path) -> None:
    train(load_recipe(short_recipe(root)), tmp_path, quiet=True)
    with pytest.raises(
        CheckpointError, match=r"another recipe; stages\.tune\.optimizer\.lr is 0\.003 there and 0\.1 here"
    ):
        train(load_recipe(short_recipe(root), ["stages.tune.optimizer.lr=0.1"]), tmp_path, quiet=True)


def test_a_folder_with_other_things_in_it_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(CheckpointError, match=r"is not empty and holds no recipe\.yaml; found thesis\.tex"):
        train(load_recipe(short_recipe(root)), tmp_path, quiet=True)
    assert not (tmp_path / "recipe.yaml").exists()


def test_two_processes_never_train_into_one_folder(root: Path, tmp_path: Path) -> None:
    with (
        run_folder.locked(tmp_path),
        pytest.raises(CheckpointError, match="another process trains into this folder; wait for its end"),
    ):
        train(load_recipe(short_recipe(root)), tmp_path, quiet=True)
    train(load_recipe(short_recipe(root)), tmp_path, quiet=True)


@pytest.mark.parametrize("place", ["checkpoint", "metrics", "tokenizer"])
def test_a_full_disk_says_so_and_the_same_command_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    recipe = load_recipe(small_recipes.decoder_recipe(root, small_recipes.stage(steps=5, save_every=2)))
    train(recipe, tmp_path / "plenty", quiet=True)
    owner, name, at = {
        "checkpoint": (checkpoints, "write_tensors", 4),
        "metrics": (MetricsLog, "append", 3),
        "tokenizer": (module, "write_tokenizer", 1),
    }[place]
    original, calls = getattr(owner, name), [0]

    def full(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(
            CheckpointError, match=r"No space left on device.*[Ff]ree space.*run the same command again"
        ):
            train(recipe, tmp_path / "scarce", quiet=True)
    train(recipe, tmp_path / "scarce", quiet=True)
    found, right = (load_file(tmp_path / run / "model.safetensors") for run in ("scarce", "plenty"))
    assert all(torch.equal(found[name], right[name]) for name in right) and found.keys() == right.keys()


def test_too_many_bad_samples_end_the_run_by_name(tmp_path: Path) -> None:
    root = small_recipes.write_data(tmp_path / "data", num=12)
    for index in range(6):
        (root / f"{index}.npy").unlink()
    stage = small_recipes.stage(steps=200, data=["questions.jsonl"], save_every=500)
    with pytest.raises(DataError, match=r"samples cannot be used, at most 5.0% are tolerated.*\d\.npy") as caught:
        train(load_recipe(small_recipes.decoder_recipe(root, stage)), tmp_path / "run", quiet=True)
    assert "quarantine.jsonl" in str(caught.value)
    recorded = small_recipes.read_lines(tmp_path / "run" / "quarantine.jsonl")
    assert {record["id"] for record in recorded} == {f"q{index}" for index in range(6)}


def test_a_few_bad_samples_are_named_and_the_run_goes_on(tmp_path: Path) -> None:
    root, progress = small_recipes.write_data(tmp_path / "data", num=12), Notes()
    (root / "2.png").unlink()
    lines = (root / "captions.jsonl").read_text().splitlines()
    lines[4] = '{"id": "torn", "messages": ['
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")
    stage = small_recipes.stage(steps=6)
    result = train(load_recipe(small_recipes.decoder_recipe(root, stage)), tmp_path / "run", progress=progress)
    assert result.num_bad_samples >= 2
    assert {record["id"] for record in small_recipes.read_lines(tmp_path / "run" / "quarantine.jsonl")} >= {"c2"}
    assert any("samples could not be used; each is named in" in note for note in progress.notes)


def test_the_best_weights_on_validation_are_the_stages_result(root: Path, tmp_path: Path) -> None:
    """A rate that destroys the model: the first validation is the best, and a run that stops there is the same."""
    wild = small_recipes.stage(
        steps=6, eval_every=2, validation="captions.jsonl", optimizer={"use": "adamw", "lr": 3.0},
        schedule={"use": "constant"},
    )  # fmt: skip
    result = train(load_recipe(small_recipes.decoder_recipe(root, wild)), tmp_path / "run", quiet=True)
    logged = small_recipes.read_lines(tmp_path / "run/stages/00-tune/metrics.jsonl")
    losses = {record["step"]: record["validation"] for record in logged if "validation" in record}
    assert list(losses) == [2, 4, 6]
    lowest = min(losses, key=lambda step: losses[step])
    assert (result.stages["tune"].best_step, result.stages["tune"].validation) == (lowest, losses[lowest])


def test_a_validation_file_that_counts_for_nothing_is_an_error(tmp_path: Path) -> None:
    root = small_recipes.write_data(tmp_path / "data", num=12)
    lines = [{**line, "label": None} for line in small_recipes.read_lines(root / "views.jsonl")]
    small_recipes.write_lines(root / "unlabelled.jsonl", lines)
    data = small_recipes.merge_recipe(root)
    data["stages"][0] |= {"eval_every": 1, "validation": "unlabelled.jsonl"}
    with pytest.raises(DataError, match=r"unlabelled.jsonl: nothing there counts for the objectives \['classify'\]"):
        train(load_recipe(data), tmp_path / "run", quiet=True)


def test_the_public_functions_take_recipes_and_overrides(root: Path, tmp_path: Path) -> None:
    data = short_recipe(root)
    network = api.build(data, ["model.backbone.transformer.depth=2"])
    assert network.get_parameter("backbone.transformer.blocks.1.mlp_norm.weight").shape == (16,)
    assert api.check(data).is_ok
    result = api.train(data, tmp_path / "run", ["stages.tune.steps=1"], quiet=True)
    assert result.stages["tune"].steps == 1
    report = api.evaluate(
        tmp_path / "run", {"use": "questions", "data": str(root / "questions.jsonl"), "max_new_tokens": 2}
    )
    assert report.overall.score.n == 12


def test_an_unfinished_folder_is_no_model(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise CheckFailed("planted")

    monkeypatch.setattr(module, "save_weights", fail)
    with pytest.raises(CheckFailed, match="planted"):
        train(load_recipe(short_recipe(root)), tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match=r"is not a run folder: model\.safetensors missing"):
        load(tmp_path / "run")
