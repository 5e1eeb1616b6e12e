"""I3D against the published shapes and its own theorem: an inflated network sees in a still what the 2-D one sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.models.encoders import ENCODERS
from polymodal.models.encoders.i3d import Clip, ClipNorm, inflated
from polymodal.models.presets import ARCHITECTURES, Vocabulary, find_size
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import num_parameters
from polymodal.recipes.exporting import export_hub

from .reference import randomise


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return ENCODERS.parse({"use": "i3d", "width": 32, "image_size": 32, **changes}).build()


def test_count_and_channels_are_the_published_ones() -> None:
    architecture, size = find_size("i3d-rgb-k400")
    with torch.device("meta"):
        network = MultimodalModel(architecture.model(HubConfigs(size.config, size.preprocessor)), 16)
        encoder = network.streams["video"].encoder
        assert num_parameters(encoder) == 12_279_984  # 12.3M
        assert num_parameters(network) == size.parameters
        # The common port of the weights has a gain in every norm.
        port = ENCODERS.parse({"use": "i3d", "width": 1024, "image_size": 224, "norm_gain": True}).build()
        assert num_parameters(port) == 12_287_264
    shapes = {name: tuple(module.three.conv.weight.shape) for name, module in encoder.mixed.items()}
    assert shapes["3b"] == (128, 96, 3, 3, 3) and shapes["4f"] == (320, 160, 3, 3, 3)
    assert tuple(encoder.stem.conv.weight.shape) == (64, 3, 7, 7, 7)
    assert encoder.config.num_features(64) == 8 * 7 * 7


def test_grids_shrink_as_published() -> None:
    encoder = make(image_size=224).eval()
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in [("stem", encoder.stem), ("conv", encoder.conv), *encoder.mixed.items()]:
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: tuple(out.x_UCLHW.shape[2:])}))
    encoder(torch.zeros(1, 16, 3, 224, 224), torch.tensor([16]))
    # Figure 3 of the paper, for 16 frames in place of 64.
    assert seen["stem"] == (8, 112, 112) and seen["conv"] == (8, 56, 56) and seen["3b"] == (8, 28, 28)
    assert seen["4b"] == (4, 14, 14) and seen["5c"] == (2, 7, 7)


def test_a_still_video_gives_the_pictures_features() -> None:
    flat = randomise(make(kernels="2d"))
    deep = make(time_padding="edge").eval()
    deep.load_state_dict(inflated(flat.state_dict(), deep))
    picture = torch.randn(1, 1, 3, 32, 32)
    lengths = torch.tensor([16])
    still = picture.expand(1, 16, 3, 32, 32)
    expected, found = flat(still, lengths), deep(still, lengths)
    torch.testing.assert_close(found.x_UND, expected.x_UND, atol=1e-5, rtol=1e-5)
    # And every step of it is that of the picture alone.
    alone = flat(picture, torch.tensor([1])).x_UND
    torch.testing.assert_close(
        found.x_UND.unflatten(1, (2, 1)), alone[:, None].expand(1, 2, 1, 32), atol=1e-5, rtol=1e-5
    )
    weights = {name: value[:, :, 0] if value.ndim == 5 else value for name, value in flat.state_dict().items()}
    again = inflated(weights, deep)
    assert all(torch.equal(value, deep.state_dict()[name]) for name, value in again.items())
    del weights["mixed.4b.three.conv.weight"]
    with pytest.raises(CheckpointError, match=r"the 2-D network has no mixed.4b.three.conv.weight"):
        inflated(weights, deep)


def test_the_pooled_vector_is_the_mean_of_means_over_pairs_of_steps() -> None:
    encoder = randomise(make())
    features = encoder(torch.randn(2, 32, 3, 32, 32), torch.tensor([32, 8]))
    x_CT = features.x_UND[0].t()
    expected = F.avg_pool1d(x_CT[None], 2, 1).mean(dim=2)[0]
    torch.testing.assert_close(features.pooled_UD[0], expected)
    torch.testing.assert_close(features.pooled_UD[1], features.x_UND[1, 0])


def test_statistics_count_real_frames_alone() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 4, 6, 2, 2)
    padded, apart = ClipNorm(4, True).train(), torch.nn.BatchNorm3d(4, eps=1e-3, momentum=0.01).train()
    padded.normalised(Clip(values, torch.tensor([6, 2]), "zeros"))
    apart(torch.cat((values[0], values[1, :, :2]), dim=1)[None])
    torch.testing.assert_close(padded.running_mean, apart.running_mean)
    torch.testing.assert_close(padded.running_var, apart.running_var)


def test_the_port_is_read_and_written(tmp_path: Path) -> None:
    configs = HubConfigs({"model_type": "i3d", "hidden_size": 32, "image_size": 32, "num_labels": 3}, {"size": 40})
    model = ARCHITECTURES["i3d"].model(configs)
    network = randomise(MultimodalModel(model, 16))
    export_hub(model, network.state_dict(), Vocabulary(16), tmp_path / "a")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert stored["Mixed_4c.b1b.conv3d.weight"].shape == (7, 4, 3, 3, 3)
    assert stored["logits.conv3d.weight"].shape == (3, 32, 1, 1, 1) and "Conv3d_1a_7x7.bn.running_var" in stored
    again = pm.load(tmp_path / "a").network
    values, lengths = torch.randn(1, 8, 3, 32, 32), torch.tensor([8])
    pooled = [net.streams["video"].encoder(values, lengths).pooled_UD for net in (network.eval(), again)]
    assert torch.equal(*pooled)
    with pytest.raises(ConfigError, match="expected one video stream with 'i3d'"):
        ARCHITECTURES["i3d"].to_hub(ARCHITECTURES["videomae"].model(HubConfigs({"model_type": "videomae"})), None)


def moving_squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos ``[count, 8, 3, 32, 32]`` of a square that moves left or right from a random place, and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    row, start = (torch.randint(low, high, (count,), generator=generator) for low, high in ((0, 24), (9, 15)))
    videos = torch.zeros(count, 8, 3, 32, 32)
    for index in range(count):
        for frame in range(8):
            column = int(start[index] + (frame - 3.5) * (2 * labels[index] - 1) * 2)
            videos[index, frame, :, row[index] : row[index] + 8, column : column + 8] = 1.0
    return videos, labels


@pytest.mark.slow
def test_it_learns_in_which_direction_things_move() -> None:
    encoder = make(width=32).train()
    head = torch.nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    videos, labels = moving_squares(48, 1)
    lengths = torch.full((16,), 8)
    for step in range(30):
        rows = torch.arange(step % 3, 48, 3)
        loss = F.cross_entropy(head(encoder(videos[rows], lengths).pooled_UD), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh, expected = moving_squares(40, 2)
    # Statistics of the batch: so few steps do not settle the running ones.
    found = head(encoder(fresh, torch.full((40,), 8)).pooled_UD).argmax(1)
    assert (found == expected).float().mean() > 0.9
    # Any single frame says nothing of it: frozen videos are guessed.
    frozen = head(encoder(fresh[:, 4:5].expand_as(fresh), torch.full((40,), 8)).pooled_UD).argmax(1)
    assert (frozen == expected).float().mean() < 0.8
