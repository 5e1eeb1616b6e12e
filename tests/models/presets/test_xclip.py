"""X-CLIP against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.core.samples import Sample
from polymodal.models.compose import to_device
from polymodal.objectives.pair_contrast import PairContrast

from .clip_tokenizer import clip_tokenizer
from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

TEXTS = ["a red dog", "the cat on the grass, 2 dogs!", "a"]


def make(folder: Path) -> Path:
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    tokenizer = clip_tokenizer(16)
    torch.manual_seed(0)
    config = transformers.XCLIPConfig(
        projection_dim=20,
        prompt_num_attention_heads=2,
        prompt_layers=2,
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "image_size": 16, "patch_size": 8, "num_frames": 3, "mit_hidden_size": 20, "mit_intermediate_size": 28,
            "mit_num_attention_heads": 4,
        },
        text_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
            "max_position_embeddings": 16, "vocab_size": len(tokenizer),
        },
    )  # fmt: skip
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model = randomise(transformers.XCLIPModel(config))
    return save_reference(model, folder, processor, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("xclip"))


def videos() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (3, 20, 25, 3), dtype=np.uint8) for _ in range(3)]


def inputs(folder: Path) -> dict[str, Any]:
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    processor = VideoMAEImageProcessorPil.from_pretrained(folder)
    values = processor([list(video) for video in videos()], return_tensors="pt")["pixel_values"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {"pixel_values": values, **tokenizer(TEXTS, padding=True, return_tensors="pt")}


def batch(model: Any) -> Batch:
    views = [
        {"video": pm.Video(video, fps=8), "text": pm.Text(text)} for video, text in zip(videos(), TEXTS, strict=True)
    ]
    samples = [Sample(str(index), views=view) for index, view in enumerate(views)]
    return to_device(model.engine.processor.batch(samples), torch.device("cpu"))


def test_every_step_equals_the_reference(folder: Path) -> None:
    given = inputs(folder)
    reference = transformers.XCLIPModel.from_pretrained(folder)
    theirs = reference(**given)
    model = pm.load(folder)
    video = model.network.streams["video"].encoder(given["pixel_values"], torch.tensor([3, 3, 3]))
    assert_close(video.x_UND.unflatten(1, (3, 5)).flatten(0, 1), theirs.vision_model_output.last_hidden_state)
    text = model.network.encode("text", batch(model).streams["text"])
    assert_close(text.pooled_UD, theirs.text_model_output.pooler_output)
    scores = model.network.heads["prompted_pairs"](video, text.pooled_UD)
    assert_close(scores.video_VE, theirs.video_embeds)
    assert_close(scores.text_VTE, theirs.text_embeds)
    assert_close(scores.logits_VT, theirs.logits_per_video)


def test_a_batch_of_files_gives_the_references_logits_and_loss(folder: Path) -> None:
    theirs = transformers.XCLIPModel.from_pretrained(folder)(**inputs(folder), return_loss=True)
    model = pm.load(folder)
    made = batch(model)
    outputs = model.network(made, {"pairs"})
    assert_close(outputs.pair_logits, theirs.logits_per_video, rel=1e-3)
    assert_close(PairContrast()(outputs, made).total, theirs.loss, rel=1e-3)


def test_padding_frames_and_other_videos_change_nothing(folder: Path) -> None:
    model = pm.load(folder).network
    encoder, head = model.streams["video"].encoder, model.heads["prompted_pairs"]
    values, texts = torch.randn(2, 3, 3, 16, 16), torch.randn(2, 24)
    values[1, 2:] = 0.0
    together = head(encoder(values, torch.tensor([3, 2])), texts).logits_VT
    alone = head(encoder(values[1:, :2], torch.tensor([2])), texts).logits_VT
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="a video of 4 frames, expected at most 3"):
        head(encoder(torch.zeros(1, 4, 3, 16, 16), torch.tensor([4])), texts)


def test_export_reloads_there_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    assert pm.load(folder).export(tmp_path / "out") == "xclip"
    again = transformers.XCLIPModel.from_pretrained(tmp_path / "out")
    assert_same_weights(again, transformers.XCLIPModel.from_pretrained(folder))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    assert_missing_is_named(folder, "prompts_generator.alpha")
