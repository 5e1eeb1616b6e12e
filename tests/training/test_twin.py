"""The momentum twin: how it follows, what queues hold, what it shares, and that a resumed run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_recipes
import torch

from polymodal.core.batch import Outputs
from polymodal.core.errors import ConfigError
from polymodal.data.loader import Loader
from polymodal.objectives.table import parse_objectives
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import stage_sources
from polymodal.training.checkpoints import Keep
from polymodal.training.freezing import apply_train
from polymodal.training.loop import StageContext, StageRun
from polymodal.training.precision import ComputeConfig
from polymodal.training.progress import Progress
from polymodal.training.twin import Twin

OBJECTIVE = {"momentum_contrast": {"pairs": [["image", "text"]], "queue": 10, "decay": 0.75}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"))


def recipe(root: Path, **changes: Any) -> Any:
    stage = small_recipes.contrast_stage(
        objectives=OBJECTIVE, train=["streams.image.encoder", "streams.text.encoder", "heads.space"], **changes
    )
    return small_recipes.decoder_recipe(root, stage)


def run_of(root: Path, folder: Path, **changes: Any) -> tuple[StageRun, Assembly]:
    parts = assemble(load_recipe(recipe(root, **changes)))
    stage = parts.recipe.stages[0]
    apply_train(parts.network, stage.train)
    torch.manual_seed(0)
    context = StageContext(
        stage=stage,
        model=parts.network,
        loader=Loader(stage_sources(parts.recipe, stage), None, parts.processor, stage.batch),
        compute=ComputeConfig(device="cpu").resolve(),
        folder=folder,
        keep=Keep(),
        progress=Progress(),
    )
    return StageRun(context), parts


def test_it_follows_by_its_decay_and_queues_what_it_said(root: Path, tmp_path: Path) -> None:
    run, parts = run_of(root, tmp_path, steps=1, accumulate=2)
    assert run.twin is not None
    name = "heads.space.projs.image.weight"
    start = parts.network.get_parameter(name).detach().clone()
    run.run()
    end = parts.network.get_parameter(name).detach()
    torch.testing.assert_close(run.twin.network.get_parameter(name), 0.75 * start + 0.25 * end)
    assert {name: tuple(queue.shape) for name, queue in run.twin.queues.items()} == dict.fromkeys(
        ("image", "sensor", "text"), (10, 8)
    )
    torch.testing.assert_close(run.twin.queues["image"].norm(dim=1), torch.ones(10))
    assert not torch.equal(start, end)


def test_what_is_frozen_is_shared_and_nothing_of_it_trains(root: Path, tmp_path: Path) -> None:
    run, parts = run_of(root, tmp_path)
    assert run.twin is not None
    frozen = [name for name, p in parts.network.named_parameters() if not p.requires_grad]
    assert frozen
    for name in frozen:
        assert run.twin.network.get_parameter(name) is parts.network.get_parameter(name)
    assert not any(p.requires_grad for p in run.twin.network.parameters())
    assert set(run.twin.state()["weights"]) == {n for n, p in parts.network.named_parameters() if p.requires_grad}


def test_a_run_cut_in_two_is_the_unbroken_run(root: Path, tmp_path: Path) -> None:
    whole, parts = run_of(root, tmp_path / "whole", steps=4, save_every=2)
    whole.run()
    halves, _ = run_of(root, tmp_path / "cut", steps=4, save_every=2)
    original, calls = StageRun._one_step, 0

    def stop_after_three(self: StageRun, micro: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return original(self, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "_one_step", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            halves.run()
    resumed, again = run_of(root, tmp_path / "cut", steps=4, save_every=2)
    resumed.run()
    assert whole.twin is not None and resumed.twin is not None
    expected, found = whole.twin.state(), resumed.twin.state()
    for kind in ("weights", "queues", "groups"):
        assert expected[kind].keys() == found[kind].keys()
        assert all(torch.equal(expected[kind][name], found[kind][name]) for name in expected[kind]), kind
    state = parts.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.network.state_dict().items())


def test_predicting_the_cost_leaves_no_trace(root: Path, tmp_path: Path) -> None:
    run, _ = run_of(root, tmp_path)
    assert run.twin is not None
    run.predict(next(iter(run.context.loader)))
    run.twin.follow()
    assert not run.twin.queues


def test_stages_without_such_an_objective_have_none(root: Path) -> None:
    parts = assemble(load_recipe(recipe(root)))
    assert Twin.of(parts.network, parse_objectives({"infonce": 1.0})) is None
    two = {"a": {"use": "momentum_contrast", "decay": 0.9}, "b": {"use": "momentum_contrast", "decay": 0.99}}
    with pytest.raises(ConfigError, match=r"found decays \[0.9, 0.99\], expected one twin for all"):
        Twin.of(parts.network, parse_objectives(two))


def test_gradient_caching_and_a_queue_exclude_each_other(root: Path) -> None:
    with pytest.raises(ConfigError, match="grad_cache does without a queue"):
        load_recipe(recipe(root, grad_cache=True))


def test_the_teacher_speaks_only_where_it_is_asked(root: Path, tmp_path: Path) -> None:
    run, _ = run_of(root, tmp_path)
    batch = run._ready(next(iter(run.context.loader)))
    assert isinstance(run._forward(batch), Outputs) and run._forward(batch).teacher is None
