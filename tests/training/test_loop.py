"""The loop: accumulation, gradient caching, checkpointing, precision, validation, what stays frozen, what stops it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_recipes
import torch

from polymodal.core.batch import Batch
from polymodal.core.errors import CheckFailed
from polymodal.data.loader import Loader
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import stage_sources
from polymodal.training.checkpoints import Keep, best
from polymodal.training.freezing import apply_train, fingerprint
from polymodal.training.loop import METRICS, StageContext, StageRun
from polymodal.training.metrics_log import read_metrics
from polymodal.training.precision import ComputeConfig
from polymodal.training.progress import Progress


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"))


class Notes(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def assembled(root: Path, stage: dict[str, Any]) -> Assembly:
    return assemble(load_recipe(small_recipes.decoder_recipe(root, stage)))


def stage_run(parts: Assembly, folder: Path, batches: list[Batch] | None = None, **changes: Any) -> StageRun:
    """The recipe's only stage, over its loader or over given batches."""
    stage = parts.recipe.stages[0]
    apply_train(parts.network, stage.train)
    loader: Any = Loader(stage_sources(parts.recipe, stage), None, parts.processor, stage.batch)
    if batches is not None:
        loader = Given(batches)
    context = StageContext(
        stage=stage,
        model=parts.network,
        loader=loader,
        compute=changes.pop("compute", ComputeConfig(device="cpu").resolve()),
        folder=folder,
        keep=Keep(best="min"),
        progress=changes.pop("progress", Progress()),
        **changes,
    )
    return StageRun(context)


class Given:
    """Batches in a row, in place of a loader."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def state(self) -> dict[str, Any]:
        return {}


def batches_of(parts: Assembly, sizes: list[int], packed: bool = True) -> list[Batch]:
    """Batches of so many samples each, drawn from the stage's sources in turn."""
    stage = parts.recipe.stages[0]
    samples = [source[i] for i in range(12) for source in stage_sources(parts.recipe, stage)]
    examples = [parts.processor.load(parts.processor.plan(sample)) for sample in samples[: sum(sizes)]]
    result, start = [], 0
    for size in sizes:
        result.append(parts.processor.collate(examples[start : start + size], packed))
        start += size
    return result


def trained_weights(root: Path, folder: Path, stage: dict[str, Any], sizes: list[int], **changes: Any) -> Any:
    parts = assembled(root, stage)
    packed = parts.recipe.stages[0].batch.packed
    run = stage_run(parts, folder, batches_of(parts, sizes, packed), **changes)
    result = run.run()
    return {name: tensor.clone() for name, tensor in parts.network.state_dict().items()}, result


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


# A rate of 0.1 makes updates of 1e-3 and more, so that a bound of 1e-7, a few last places of a float32 weight near 1,
# still sees a thousandth of one.
PLAIN = {"steps": 1, "optimizer": {"use": "adamw", "lr": 0.1, "eps": 1.0}, "clip": None}


@pytest.mark.parametrize("options", [1.0, {"average": "sample"}, {"weights": {"image": 3.0}}])
def test_accumulated_batches_count_as_one_batch_as_large(root: Path, tmp_path: Path, options: Any) -> None:
    """Batches of 1, 5 and 2 samples, of which each must weigh by its tokens (or samples), against one of 8."""
    one = small_recipes.stage(objectives={"next_token": options}, **PLAIN)
    whole, whole_result = trained_weights(root, tmp_path / "a", one, [8])
    parts, parts_result = trained_weights(root, tmp_path / "b", {**one, "accumulate": 3}, [1, 5, 2])
    assert largest_difference(whole, parts) < 1e-7, "eps = 1 makes the update proportional to the gradient"
    assert parts_result.losses["next_token"] == pytest.approx(whole_result.losses["next_token"], rel=1e-6)
    assert parts_result.num_tokens == whole_result.num_tokens and parts_result.num_samples == 8
    start = assembled(root, one).network.state_dict()
    assert largest_difference(whole, start) > 1e-3, "the step did something"


def test_several_objectives_are_weighted_each_by_its_own_count(root: Path, tmp_path: Path) -> None:
    objectives = {"next_token": 1.0, "again": {"use": "next_token", "average": "sample", "weight": 0.5}}
    one = small_recipes.stage(objectives=objectives, **PLAIN)
    whole, _ = trained_weights(root, tmp_path / "a", one, [6])
    parts, _ = trained_weights(root, tmp_path / "b", {**one, "accumulate": 2}, [1, 5])
    assert largest_difference(whole, parts) < 1e-7


@pytest.mark.parametrize("kind", ["classify", "padded"])
def test_accumulation_weighs_padded_batches_and_labels_too(root: Path, tmp_path: Path, kind: str) -> None:
    if kind == "padded":
        one = small_recipes.stage(objectives={"next_token": {"average": "sample"}}, batch={"samples": 4}, **PLAIN)
        whole, _ = trained_weights(root, tmp_path / "a", one, [5])
        parts, _ = trained_weights(root, tmp_path / "b", {**one, "accumulate": 2}, [1, 4])
        assert largest_difference(whole, parts) < 1e-7
        return
    recipe = small_recipes.merge_recipe(root)
    for stream in recipe["model"]["streams"].values():
        stream["enters"] = "merge"
    found = []
    for sizes in ([6], [1, 5]):
        recipe["stages"] = [{**recipe["stages"][0], **PLAIN, "accumulate": len(sizes)}]
        parts = assemble(load_recipe(recipe))
        batches = batches_of(parts, sizes, packed=False)
        batches[-1].labels[-1] = None
        stage_run(parts, tmp_path / str(len(sizes)), batches).run()
        found.append(parts.network.state_dict())
    assert largest_difference(found[0], found[1]) < 1e-7


def test_gradient_caching_contrasts_all_micro_batches_as_one(root: Path, tmp_path: Path) -> None:
    one = small_recipes.contrast_stage(**PLAIN)
    whole, whole_result = trained_weights(root, tmp_path / "a", one, [8])
    cached, cached_result = trained_weights(root, tmp_path / "b", {**one, "accumulate": 2, "grad_cache": True}, [3, 5])
    assert largest_difference(whole, cached) < 1e-7
    assert cached_result.losses["infonce"] == pytest.approx(whole_result.losses["infonce"], rel=1e-5)
    apart, _ = trained_weights(root, tmp_path / "c", {**one, "accumulate": 2}, [3, 5])
    assert largest_difference(whole, apart) > 1e-5, "without the cache each micro-batch has its own negatives only"


def test_activation_checkpointing_changes_nothing_but_memory(root: Path, tmp_path: Path) -> None:
    plain, plain_result = trained_weights(root, tmp_path / "a", small_recipes.stage(steps=2), [4, 4])
    saving, saving_result = trained_weights(
        root, tmp_path / "b", small_recipes.stage(steps=2, checkpoint_activations=True), [4, 4]
    )
    assert largest_difference(plain, saving) < 1e-6
    assert saving_result.losses == pytest.approx(plain_result.losses, rel=1e-5)
    assert saving_result.cost.activation_bytes < plain_result.cost.activation_bytes


def test_bfloat16_runs_with_float32_weights_and_close_losses(root: Path, tmp_path: Path) -> None:
    stage = small_recipes.stage(steps=3)
    exact, exact_result = trained_weights(root, tmp_path / "a", stage, [4, 4, 4])
    half = ComputeConfig(device="cpu", dtype="bfloat16").resolve()
    rough, rough_result = trained_weights(root, tmp_path / "b", stage, [4, 4, 4], compute=half)
    assert {tensor.dtype for tensor in rough.values()} == {torch.float32}
    assert rough_result.losses["next_token"] == pytest.approx(exact_result.losses["next_token"], rel=0.02)
    assert largest_difference(exact, rough) > 0.0


def test_the_best_weights_are_kept_and_the_metrics_say_every_validation(root: Path, tmp_path: Path) -> None:
    stage = small_recipes.stage(steps=6, eval_every=2, validation="captions.jsonl", save_every=100)
    parts = assembled(root, stage)
    losses = iter([0.9, 0.3, 0.8])
    seen: list[dict[str, torch.Tensor]] = []

    def validate() -> float:
        seen.append({name: tensor.clone() for name, tensor in parts.network.state_dict().items()})
        return next(losses)

    progress = Notes()
    result = stage_run(parts, tmp_path, validate=validate, progress=progress).run()
    assert (result.best_step, result.validation) == (4, 0.3)
    assert largest_difference(parts.network.state_dict(), seen[1]) == 0.0
    assert largest_difference(parts.network.state_dict(), seen[2]) > 0.0
    logged = {
        record["step"]: record["validation"] for record in read_metrics(tmp_path / METRICS) if "validation" in record
    }
    assert logged == {2: 0.9, 4: 0.3, 6: 0.8}
    assert "the weights of step 4 are kept" in progress.notes[-1]
    found = best(tmp_path, "min")
    assert found is not None and found.step == 4


def test_a_frozen_tensor_that_changes_ends_the_stage(root: Path, tmp_path: Path) -> None:
    parts = assembled(root, small_recipes.stage(steps=1))
    run = stage_run(parts, tmp_path)
    step = run.optimizer.step

    def drift(*args: Any) -> None:
        step(*args)
        with torch.no_grad():
            parts.network.get_parameter("heads.space.log_scale").add_(1e-3)

    run.optimizer.step = drift  # type: ignore[method-assign]
    with pytest.raises(
        CheckFailed, match="stage 'tune': a frozen tensor changed during the stage; its result is not kept"
    ):
        run.run()


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_samples(root: Path, tmp_path: Path) -> None:
    parts = assembled(root, small_recipes.stage(accumulate=2))
    batches = batches_of(parts, [2, 3])
    run = stage_run(parts, tmp_path, batches)
    state = fingerprint(parts.network, parts.network.state_dict())
    batches[1].streams["image"].values[0] = float("nan")
    first, second = batches[0].sample_ids, batches[1].sample_ids
    with pytest.raises(CheckFailed) as caught:
        run.run()
    message = str(caught.value)
    assert message.startswith("stage 'tune', step 1: next_token is nan, expected a finite number, on the samples ")
    assert ", ".join(second) in message and first[0] not in message, "only the batch that is at fault is named"
    assert fingerprint(parts.network, parts.network.state_dict()) == state


def test_a_gradient_that_is_not_finite_stops_too(root: Path, tmp_path: Path) -> None:
    parts = assembled(root, small_recipes.stage(steps=1))
    run = stage_run(parts, tmp_path)
    parts.network.get_parameter("backbone.embed_tokens.weight").register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(CheckFailed, match=r"grad_norm is (nan|inf), expected a finite number, on the samples c|q"):
        run.run()


def test_the_cost_is_said_before_the_first_step_and_compared_after_the_last(root: Path, tmp_path: Path) -> None:
    parts = assembled(root, small_recipes.stage(steps=3))
    progress = Notes()
    result = stage_run(parts, tmp_path, progress=progress).run()
    trained = sum(p.numel() for p in parts.network.parameters() if p.requires_grad)
    assert progress.notes[0].startswith(f"tune: {trained:,} parameters train, ")
    assert "predicted" in progress.notes[0] and "for 3 steps" in progress.notes[0]
    assert progress.notes[-1].startswith("tune: took ") and "predicted" in progress.notes[-1]
    cost = result.cost
    assert cost is not None and cost.num_steps == 3 and cost.total_s == pytest.approx(3 * cost.step_s)
    assert cost.training_bytes == 3 * 4 * trained, "gradients and the two moments of AdamW in float32"
    assert cost.weights_bytes == 4 * sum(p.numel() for p in parts.network.parameters())
    assert cost.peak_bytes >= cost.base_bytes + cost.training_bytes


def test_the_prediction_changes_nothing(root: Path, tmp_path: Path) -> None:
    """With dropout, so that a random number drawn more would show."""
    stage = small_recipes.stage(steps=2)
    parts = assemble(load_recipe(small_recipes.decoder_recipe(root, stage, backbone={"transformer": {"dropout": 0.5}})))
    run = stage_run(parts, tmp_path)
    batch = next(iter(run.context.loader))
    state, random = fingerprint(parts.network, parts.network.state_dict()), torch.get_rng_state()
    run.predict(batch)
    assert fingerprint(parts.network, parts.network.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in parts.network.parameters())


def test_activation_bytes_are_what_the_backward_pass_keeps(root: Path, tmp_path: Path) -> None:
    """Twice the samples keep about twice as much."""
    parts = assembled(root, small_recipes.stage())
    small, large = batches_of(parts, [4, 4])[0], batches_of(parts, [8])[0]
    run = stage_run(parts, tmp_path, [small])
    ratio = run.predict(large).activation_bytes / run.predict(small).activation_bytes
    assert 1.5 < ratio < 2.5


def test_the_prediction_sees_every_source_where_batches_are_of_one(root: Path, tmp_path: Path) -> None:
    """Whichever source the first batch is of, the costliest one decides the memory."""
    for name in ("image", "sensor"):
        lines = small_recipes.read_lines(root / "views.jsonl")
        for line in lines:
            line["views"] = {key: line["views"][key] for key in (name, "text")}
        small_recipes.write_lines(root / f"{name}-views.jsonl", lines)

    def kept(*names: str, **batch: Any) -> list[int]:
        data = [f"{name}-views.jsonl" for name in names]
        parts = assembled(root, small_recipes.contrast_stage(data=data, batch={"samples": 6, **batch}))
        run = stage_run(parts, tmp_path)
        loader = iter(run.context.loader)
        return [run.predict(next(loader)).activation_bytes for _ in range(3)]

    apart = {name: kept(name)[0] for name in ("image", "sensor")}
    assert apart["image"] != apart["sensor"]
    assert kept("image", "sensor", one_source=True) == [max(apart.values())] * 3
