"""TimeSformer against the reference library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.encoders import ENCODERS

from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")


def saved(folder: Path, kind: str, attention: str = "divided_space_time") -> Path:
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_frames=3, num_labels=5, attention_type=attention,
    )  # fmt: skip
    return save_reference(randomise(getattr(transformers, kind)(config)), folder)


def frames(length: int = 3) -> torch.Tensor:
    return torch.randn(2, length, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time"])
def test_features_classes_and_export_equal_the_reference(tmp_path: Path, attention: str) -> None:
    folder = saved(tmp_path / "a", "TimesformerForVideoClassification", attention)
    reference = transformers.TimesformerForVideoClassification.from_pretrained(folder)
    model = pm.load(folder)
    features = model.network.streams["video"].encoder(frames(), torch.tensor([3, 3]))
    states = reference.timesformer(frames()).last_hidden_state
    # Theirs stand place by place, ours frame by frame.
    by_frame = states[:, 1:].unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    assert_close(features.x_UND, by_frame)
    assert_close(features.pooled_UD, states[:, 0])
    assert_close(model.network.heads["class"](features.pooled_UD), reference(frames()).logits)
    assert model.export(tmp_path / "b") == "timesformer"
    assert_same_weights(transformers.TimesformerForVideoClassification.from_pretrained(tmp_path / "b"), reference)


def test_a_file_gives_what_the_reference_computes(tmp_path: Path) -> None:
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    folder = saved(tmp_path, "TimesformerModel")
    processor = VideoMAEImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, image_mean=[0.45] * 3, image_std=[0.225] * 3
    )
    processor.save_pretrained(folder)
    clip = np.random.default_rng(0).integers(0, 256, (3, 30, 23, 3), dtype=np.uint8)
    values = processor([list(clip)], return_tensors="pt")["pixel_values"]
    expected = transformers.TimesformerModel.from_pretrained(folder)(values).last_hidden_state[:, 0]
    assert_close(pm.load(folder).features([pm.Video(clip, fps=8)])[0].pooled, expected, rel=1e-3)


def test_more_frames_than_codes_of_time_are_refused() -> None:
    encoder = ENCODERS.parse({"use": "space_time", "num_frames": 2}).build()
    with pytest.raises(ConfigError, match="found a video of 3 frames, expected at most num_frames 2"):
        encoder(torch.zeros(1, 3, 3, 64, 64), torch.tensor([3]))


def test_what_is_not_built_and_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "TimesformerModel", "space_only")
    with pytest.raises(ConfigError, match="attention_type: 'space_only', expected 'divided_space_time'"):
        pm.load(folder)
    assert_missing_is_named(saved(tmp_path / "b", "TimesformerModel"), "embeddings.time_embeddings")
