"""VideoMAE against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm

from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8, "num_frames": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24,
}  # fmt: skip


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    torch.manual_seed(0)
    model = randomise(getattr(transformers, kind)(transformers.VideoMAEConfig(**{**SMALL, **changes})))
    processor = VideoMAEImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]
    )
    return save_reference(model, folder, processor)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {0: "left", 1: "right", 2: "up"}
    return saved(tmp_path_factory.mktemp("c"), "VideoMAEForVideoClassification", id2label=labels)


def clip(frames: int = 4, height: int = 24, width: int = 31) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def pixel_values(folder: Path, frames: np.ndarray) -> torch.Tensor:
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    processor = VideoMAEImageProcessorPil.from_pretrained(folder)
    return processor([list(frames)], return_tensors="pt")["pixel_values"]


def test_preprocessing_equals_the_reference(classifier: Path) -> None:
    model = pm.load(classifier)
    reader = model.engine.processor.streams["video"].reader
    found = reader.read(pm.Video(clip(), fps=8)).units[0]
    assert_close(found, pixel_values(classifier, clip())[0], rel=1e-3)


def test_features_and_classes_equal_the_reference(classifier: Path) -> None:
    model = pm.load(classifier)
    reference = transformers.VideoMAEForVideoClassification.from_pretrained(classifier)
    values = pixel_values(classifier, clip())
    states = reference.videomae(values).last_hidden_state
    found = model.features([pm.Video(clip(), fps=8)])[0]
    assert_close(found.features, states, rel=1e-3)
    encoder = model.network.streams["video"].encoder
    features = encoder(values, torch.tensor([4]))
    assert_close(features.x_UND, states)
    assert_close(model.network.heads["class"](features.pooled_UD), reference(values).logits)
    assert model.recipe.model.heads["class"].classes == ("left", "right", "up")


@pytest.mark.parametrize("by_mean", [True, False])
def test_encoder_alone_and_its_first_state(tmp_path: Path, by_mean: bool) -> None:
    folder = saved(tmp_path, "VideoMAEModel", use_mean_pooling=by_mean)
    reference = transformers.VideoMAEModel.from_pretrained(folder)
    values = pixel_values(folder, clip())
    states = reference(values).last_hidden_state
    features = pm.load(folder).network.streams["video"].encoder(values, torch.tensor([4]))
    assert_close(features.x_UND, states)
    assert_close(features.pooled_UD, states.mean(1) if by_mean else states[:, 0])


@pytest.mark.parametrize("normalised", [True, False])
def test_masked_pretraining_equals_the_reference(tmp_path: Path, normalised: bool) -> None:
    folder = saved(tmp_path / "a", "VideoMAEForPreTraining", norm_pix_loss=normalised, use_mean_pooling=False)
    reference = transformers.VideoMAEForPreTraining.from_pretrained(folder)
    model = pm.load(folder)
    values = pixel_values(folder, clip())
    is_masked = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1]]).bool()
    theirs = reference(values, bool_masked_pos=is_masked)
    head, encoder = model.network.heads["masked_patches"], model.network.streams["video"].encoder
    rebuilt, targets = head(encoder, values, torch.tensor([4]), is_masked)
    assert_close(rebuilt, theirs.logits[0])
    if normalised:
        assert_close(torch.nn.functional.mse_loss(rebuilt, targets), theirs.loss)
    model.export(tmp_path / "b")
    again = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "b")
    assert_same_weights(again, reference)


def test_export_reloads_there_bit_for_bit(classifier: Path, tmp_path: Path) -> None:
    assert pm.load(classifier).export(tmp_path / "out") == "videomae"
    again = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "out")
    assert_same_weights(again, transformers.VideoMAEForVideoClassification.from_pretrained(classifier))
    assert again.config.id2label == {0: "left", 1: "right", 2: "up"}
    assert torch.equal(pixel_values(tmp_path / "out", clip()), pixel_values(classifier, clip()))


def test_a_missing_tensor_is_named(classifier: Path) -> None:
    assert_missing_is_named(classifier, "fc_norm.weight")
