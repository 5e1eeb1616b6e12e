"""PointNet and Point-BERT: published counts and shapes, their own mechanisms, and toy sets that they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.models.encoders import ENCODERS
from polymodal.models.encoders.pointnet_aligned import orthogonality, turn
from polymodal.models.presets import ARCHITECTURES, Vocabulary, find_size
from polymodal.models.weights import HubConfigs
from polymodal.recipes.exporting import export_hub

from .reference import randomise

SMALL: dict[str, dict[str, Any]] = {
    "pointnet": {"first": [16, 16], "second": [16, 32], "whole": [16], "width": 16, "dropout": 0.0},
    "point_bert": {"trans_dim": 32, "depth": 2, "num_heads": 2, "num_group": 8, "group_size": 8},
}


def clouds(count: int, seed: int, points: int = 96) -> tuple[Tensor, Tensor]:
    """Points on spheres and on cubes, turned at random, and which."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, points, 3, generator=generator)
    labels = torch.arange(count) % 2
    norm = torch.where(labels[:, None, None] == 0, x.norm(dim=2, keepdim=True), x.abs().amax(2, keepdim=True) * 1.2)
    rotation, _ = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))
    return (x / norm) @ rotation, labels


@pytest.mark.parametrize(
    ("name", "published"),
    [("pointnet-modelnet40", 3.5e6), ("pointnet-vanilla-modelnet40", 0.8e6), ("point-bert-modelnet40", 22e6)],
)
def test_counts_are_the_published_ones(name: str, published: float) -> None:
    architecture, size = find_size(name)
    with torch.device("meta"):
        network = MultimodalModel(architecture.model(HubConfigs(size.config)), 16)
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == size.parameters and abs(found / published - 1) < 0.03


def test_group_embedding_has_the_published_shapes() -> None:
    architecture, size = find_size("point-bert-modelnet40")
    with torch.device("meta"):
        network = MultimodalModel(architecture.model(HubConfigs(size.config)), 16)
    state = {name: tuple(value.shape) for name, value in network.streams["points"].encoder.state_dict().items()}
    assert [state[f"group.{part}.weight"] for part in ("first.0", "first.3", "second.0", "second.3", "reduce")] == [
        (128, 3), (256, 128), (512, 512), (256, 512), (384, 256)
    ]  # fmt: skip
    assert state["centre_proj.0.weight"] == (128, 3) and state["centre_proj.2.weight"] == (384, 128)
    assert "transformer.blocks.0.attention.q_proj.bias" not in state


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "points"), [("pointnet", 16, 64), ("point_bert", 32, 96)])
def test_it_learns_shapes_whatever_their_turn(name: str, count: int, points: int) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].model(HubConfigs({"model_type": name, "num_labels": 2, **SMALL[name]}))
    network = MultimodalModel(model, 16).train()
    encoder, head = network.streams["points"].encoder, network.heads["class"]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(40):
        values, labels = clouds(count, step, points)
        logits = head(encoder(values, torch.full((count,), points)).pooled_UD)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, labels = clouds(64, 1000, points)
    found = head(encoder(values, torch.full((64,), points)).pooled_UD).argmax(1)
    assert (found == labels).float().mean() > 0.85


def test_export_and_its_names_round_trip(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = {"pointnet": "feature_alignment.matrix.weight", "point_bert": "blocks.blocks.1.attn.qkv.weight"}
    for name, tensor in expected.items():
        model = ARCHITECTURES[name].model(HubConfigs({"model_type": name, "num_labels": 3, **SMALL[name]}))
        network = randomise(MultimodalModel(model, 16))
        assert export_hub(model, network.state_dict(), Vocabulary(16), tmp_path / name) == name
        again = pm.load(tmp_path / name)
        values, lengths = clouds(2, 0)[0], torch.tensor([96, 50])
        one, other = (net.streams["points"].encoder(values, lengths) for net in (network, again.network))
        assert torch.equal(one.pooled_UD, other.pooled_UD) and one.pooled_UD.abs().sum() > 0
        stored = load_file(tmp_path / name / "model.safetensors")
        del stored[tensor]
        save_file(stored, tmp_path / name / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"missing: {tensor}"):
            pm.load(tmp_path / name)
    assert load_file(tmp_path / "point_bert" / "model.safetensors")["encoder.first_conv.0.weight"].shape == (128, 3, 1)


def test_alignments_turn_each_cloud_by_its_own_matrix() -> None:
    matrices = torch.randn(2, 3, 3)
    points = torch.randn(5, 3)
    found = turn(points, matrices, torch.tensor([2, 3]))
    torch.testing.assert_close(found, torch.cat((points[:2] @ matrices[0], points[2:] @ matrices[1])))
    rotation, _ = torch.linalg.qr(matrices)
    assert orthogonality(rotation) < 1e-10 < orthogonality(2 * rotation)
    torch.testing.assert_close(orthogonality(2 * rotation), torch.tensor(27.0))


def test_centres_before_every_block_are_not_centres_once() -> None:
    torch.manual_seed(0)
    config = {"use": "point_groups", "colour": False, "num_groups": 4, "group_size": 4}
    once, every = (ENCODERS.parse({**config, "centres": kind}).build().eval() for kind in ("once", "every_block"))
    every.load_state_dict(once.state_dict())
    values, lengths = clouds(1, 0)[0], torch.tensor([96])
    assert not torch.allclose(once(values, lengths).x_UND, every(values, lengths).x_UND)


def test_other_models_are_refused() -> None:
    other = ARCHITECTURES["patchtst"].model(HubConfigs({"model_type": "patchtst"}))
    for name, part in (("pointnet", "pointnet_aligned"), ("point_bert", "point_groups")):
        with pytest.raises(ConfigError, match=part):
            ARCHITECTURES[name].to_hub(other, Vocabulary(1))
