"""The shares of micro-batches, and that what an objective says it will count is what it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_recipes
import torch

from polymodal.models.compose import to_device
from polymodal.objectives.table import parse_objectives, weighted_losses
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import stage_sources
from polymodal.training.accumulate import Mean, batch_shares, mean_losses, scaled


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"), num=9)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", [{}, {"average": "sample"}])
def test_next_token_counts_before_the_pass_what_it_counts_after(root: Path, packed: bool, options: Any) -> None:
    parts = assemble(load_recipe(small_recipes.decoder_recipe(root)))
    source = stage_sources(parts.recipe, parts.recipe.stages[0])[0]
    plans = [parts.processor.plan(source[index]) for index in range(4)]
    plans[2].is_supervised = [False] * plans[2].num_tokens
    batch = to_device(parts.processor.collate([parts.processor.load(plan) for plan in plans], packed), "cpu")
    objectives = parse_objectives({"next_token": options})
    with torch.no_grad():
        losses = weighted_losses(objectives, parts.network(batch), batch)
    assert objectives[0].config.count(batch) == losses.reports["next_token"].count
    assert losses.reports["next_token"].count == (3 if options else int(batch.is_supervised.sum()))
    total, means = mean_losses(objectives, [batch, batch], lambda _: losses)
    assert total == pytest.approx(float(losses.total)) and means["next_token"] == pytest.approx(total)


@pytest.mark.parametrize(("objective", "count"), [
    ({"classify": {"classes": ["red", "green", "blue"]}}, 4),
    ({"matching": {}}, 4),
    ({"matching": {"negatives": "batch"}}, 6),
    ({"infonce": {}}, 6),
])  # fmt: skip
def test_labels_and_samples_are_counted(root: Path, objective: dict[str, Any], count: int) -> None:
    parts = assemble(load_recipe(small_recipes.merge_recipe(root)))
    source = stage_sources(parts.recipe, parts.recipe.stages[0])[0]
    batch = parts.processor.batch([source[index] for index in range(6)])
    batch.labels[1] = batch.labels[4] = None
    (entry,) = parse_objectives(objective)
    assert entry.config.count(batch) == count


def test_shares_follow_the_counts_and_a_lone_batch_has_the_whole() -> None:
    objectives = parse_objectives({"infonce": 2.0})

    class Sized:
        def __init__(self, num_samples: int) -> None:
            self.num_samples = num_samples

    batches: list[Any] = [Sized(1), Sized(0), Sized(3)]
    shares = batch_shares(objectives, batches)
    assert shares == [{"infonce": 0.25}, {"infonce": 0.0}, {"infonce": 0.75}]
    assert batch_shares(objectives, batches[1:2]) == [{"infonce": 1.0}]
    assert [entry.weight for entry in scaled(objectives, shares[2])] == [1.5]
    assert scaled(objectives, shares[1]) == []


def test_parts_are_averaged_over_the_batches_that_have_them() -> None:
    mean = Mean()
    mean.add({"next_token": 2.0, "next_token/image": 4.0}, {"next_token": 0.75})
    mean.add({"next_token": 1.0}, {"next_token": 0.25})
    assert mean.values() == {"next_token": 1.75, "next_token/image": 4.0}
