"""Masked pretraining of videos: what is hidden, what is rebuilt, and that rebuilding is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polymodal.core.batch import Batch, StreamBatch
from polymodal.core.errors import ConfigError
from polymodal.models.compose import ModelConfig, MultimodalModel
from polymodal.objectives.table import parse_objectives, weighted_losses


def model(**encoder: Any) -> MultimodalModel:
    torch.manual_seed(0)
    tubes = {"use": "tubelet", "image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, **encoder}
    head = {"use": "masked_patches", "stream": "video", "width": 16, "depth": 1, "heads": 2, "mask_ratio": 0.5}
    streams = {"video": {"modality": "video", "encoder": tubes}}
    data = {"streams": streams, "backbone": "none", "heads": {"masked_patches": head}}
    return MultimodalModel(ModelConfig.parse(data), 16)


def batch(values: torch.Tensor, lengths: list[int]) -> Batch:
    count = len(values)
    stream = StreamBatch(
        values=values,
        lengths=torch.tensor(lengths),
        unit_counts=[1] * count,
        sample_of_item=torch.arange(count),
        token_index=torch.zeros(0, dtype=torch.int64),
        token_counts=[],
        keys=[],
        grids=[None] * count,
    )
    empty = torch.zeros(count, 0, dtype=torch.int64)
    return Batch(
        ids=empty, is_valid=empty.bool(), is_supervised=empty.bool(), positions=empty, segment_lengths=None,
        streams={"video": stream}, sample_ids=[str(row) for row in range(count)], labels=[None] * count,
        modalities=[("video",)] * count,
    )  # fmt: skip


def test_tubes_are_hidden_in_every_step_alike() -> None:
    network = model()
    head, encoder = network.heads["masked_patches"], network.streams["video"].encoder
    tubelets = encoder.cut(torch.randn(5, 6, 3, 8, 8), torch.full((5,), 6))
    mask = head.draw(tubelets).unflatten(1, (3, 4))
    assert (mask == mask[:, :1]).all() and (mask[:, 0].sum(1) == 2).all()


def test_the_encoder_sees_nothing_of_what_is_hidden() -> None:
    encoder = model().streams["video"].encoder.eval()
    values, lengths = torch.randn(1, 2, 3, 8, 8), torch.tensor([2])
    mask = torch.tensor([[True, False, False, True]])
    changed = values.clone()
    changed[..., :4, :4] = 9.0
    one, other = (encoder.visible(encoder.cut(video, lengths), mask) for video in (values, changed))
    assert torch.equal(one, other) and one.shape == (1, 2, 16)


def test_videos_of_different_lengths_stand_side_by_side() -> None:
    network = model()
    outputs = network(batch(torch.randn(3, 6, 3, 8, 8), [6, 3, 6]), {"rebuild"})
    # 3, 2 and 3 steps of 2 hidden places; the odd last frame is completed by a blank one.
    assert outputs.rebuilt.shape == outputs.rebuilt_targets.shape == ((3 + 2 + 3) * 2, 96)


def test_rebuilding_is_learned() -> None:
    network = model().train()
    objectives = parse_objectives({"masked_patches": 1.0})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(45):
        # A brightness that rises from left to right or the other way: one tube tells the others.
        sign = torch.randint(0, 2, (16, 1, 1, 1, 1), generator=generator) * 2.0 - 1.0
        videos = (sign * torch.linspace(-1, 1, 8)).expand(16, 4, 3, 8, 8)
        made = batch(videos + 0.01 * torch.randn(videos.shape, generator=generator), [4] * 16)
        total = weighted_losses(objectives, network(made, {"rebuild"}), made).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    # A constant mean reaches 1 on normalised targets.
    assert losses[0] > 1.0 and np.mean(losses[-5:]) < 0.3


def test_an_absent_video_counts_nothing_and_other_encoders_are_refused() -> None:
    network = model()
    made = batch(torch.randn(1, 2, 3, 8, 8), [2])
    made.streams.clear()
    assert weighted_losses(parse_objectives({"masked_patches": 1.0}), network(made, {"rebuild"}), made).total == 0
    with pytest.raises(ConfigError, match="expected the encoder 'tubelet' with attention: joint"):
        model(attention="divided", depth=2)
