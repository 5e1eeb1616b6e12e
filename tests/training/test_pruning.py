"""Magnitude pruning: the schedule, the scopes, masks that hold, and the proof."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal.core.errors import CheckFailed, ConfigError
from polymodal.training.pruning import PruneConfig, Pruner


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 10), nn.Conv1d(10, 4, 3), nn.LayerNorm(4), nn.Linear(4, 6))
    model[4].weight.data *= 0.01
    return model


def test_the_schedule_is_cubic():
    config = PruneConfig(sparsity=0.8, begin=0.25, end=0.75)
    shares = [config.target(step, 100) for step in (0, 25, 50, 75, 100)]
    assert shares == pytest.approx([0.0, 0.0, 0.7, 0.8, 0.8])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smallest_weights_go_and_stay(scope):
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = Pruner(PruneConfig(sparsity=0.5, scope=scope, end=0.5, every=2), model, 20)
    assert set(pruner.weights) == {"1.weight", "2.weight", "4.weight"}
    found = []
    for step in range(1, 21):
        for parameter in model.parameters():
            parameter.data += 1e-6
        found.append(pruner.after(step))
    assert found == sorted(found) and found[0] == 0.0 and found[9] == found[-1] == pytest.approx(0.5, abs=0.02)
    assert pruner.prove("s") == pytest.approx(0.5, abs=0.02)
    shares = {name: float((p == 0).float().mean()) for name, p in pruner.weights.items()}
    if scope == "layer":
        assert all(share == pytest.approx(0.5, abs=0.03) for share in shares.values())
    else:
        assert shares["4.weight"] == 1.0, "the smallest matrix is the first to go"
    name = "1.weight"
    kept = before[name][pruner.masks[name]].abs()
    gone = before[name][~pruner.masks[name]].abs()
    assert kept.min() >= gone.max() - 1e-4
    assert torch.equal((model[0].weight == 0), (before["0.weight"] == 0)), "embeddings are not pruned"


def test_masks_go_on_from_a_checkpoint():
    model = network()
    pruner = Pruner(PruneConfig(sparsity=0.5, end=1.0), model, 10)
    pruner.after(10)
    other = Pruner(PruneConfig(sparsity=0.5, end=1.0), model, 10)
    other.restore(pruner.state())
    assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())


def test_messages():
    model = network()
    with pytest.raises(ConfigError, match=r"found begin 0.6 and end 0.5, expected begin before end"):
        PruneConfig.parse({"sparsity": 0.5, "begin": 0.6})
    with pytest.raises(ConfigError, match=r"prune.match: no trained matrix matches '7'; nearest: "):
        Pruner(PruneConfig(sparsity=0.5, match=("7",)), model, 10)
    pruner = Pruner(PruneConfig(sparsity=0.5, match=("1",)), model, 10)
    with pytest.raises(CheckFailed, match=r"stage 's': 0.0000 are zero, expected a sparsity of 0.5"):
        pruner.prove("s")
    pruner.after(5)
    model[1].weight.data.fill_(1.0)
    with pytest.raises(CheckFailed, match=r"stage 's': 1.weight has pruned weights that are not zero"):
        pruner.prove("s")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="prune: no weight of a linear layer or convolution trains in this stage"):
        Pruner(PruneConfig(sparsity=0.5), model, 10)
