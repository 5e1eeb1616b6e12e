"""A latent backbone from random weights: several modalities at once, any of them absent, learned and reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import Sample
from polymodal.models.backbones.latent import LatentBlock, LatentConfig
from polymodal.models.compose import ModelConfig, MultimodalModel, to_device


def recipe(folder: Path, **head: Any) -> dict[str, Any]:
    """Colours named by pixels, bytes and a recording, all read by the same latents."""
    pixels = {"use": "pixels", "image_size": 16, "bands": 4, "stem": "none"}
    names = list(small_recipes.COLOURS)
    return {
        "name": "latent",
        "seed": 0,
        "data_root": str(folder),
        "model": {
            "streams": {
                "image": {"modality": "image", "encoder": pixels, "connector": "linear", "enters": "latent"},
                "sensor": {
                    "modality": "sensor",
                    "encoder": {"use": "tcn", "num_channels": 2, "depth": 1, "width": 24},
                    "connector": "linear",
                    "enters": "latent",
                },
                "text": {
                    "modality": "text",
                    "encoder": {"use": "embedding", "vocab_size": 262, "width": 24},
                    "reader": {"use": "text", "bytes": True},
                    "enters": "latent",
                },
            },
            "backbone": {"use": "latent", "latents": 8, "width": 32, "input_width": 24, "depth": 2, "heads": 2},
            "heads": {"class": {"use": "class", "classes": names, **head}},
        },
        "stages": [
            {
                "name": "learn",
                "train": ["streams", "backbone", "heads"],
                "data": ["views.jsonl"],
                "objectives": {"classify": {"classes": names}},
                "steps": 80,
                "batch": {"samples": 12},
                "optimizer": {"use": "adamw", "lr": 1.0e-2},
            }
        ],
    }


@pytest.mark.slow
def test_it_learns_with_any_modality_absent_and_reloads(tmp_path: Path) -> None:
    folder = small_recipes.write_data(tmp_path / "data")
    rows = small_recipes.read_lines(folder / "views.jsonl")
    for index, row in enumerate(rows):
        # Every third sample lacks its picture, every third its name: what is left must do.
        row["views"].pop(("image", "text", "sensor")[index // 3 % 3])
    small_recipes.write_lines(folder / "views.jsonl", rows)
    pm.train(recipe(folder, query_heads=2), out=tmp_path / "run")
    model = pm.load(tmp_path / "run")
    red = np.full((16, 16, 3), small_recipes.COLOURS["red"], np.uint8)
    samples = [
        Sample("both", views={"image": pm.Image(red), "text": pm.Text("red")}),
        Sample("picture", views={"image": pm.Image(red)}),
        Sample("name", views={"text": pm.Text("blue")}),
    ]
    labels, chances = model.classify(samples)
    assert labels == ["red", "red", "blue"]
    # A sample alone is what it is in a batch: absent modalities and padding change nothing.
    alone = np.concatenate([model.classify([sample])[1] for sample in samples])
    np.testing.assert_allclose(chances, alone, atol=1e-5)


def test_the_mean_of_the_latents_is_classified_without_a_query() -> None:
    model = ModelConfig.parse(recipe(Path("."))["model"])
    network = MultimodalModel(model, 16)
    assert network.heads["class"].weight.shape == (3, 32)
    assert set(network.backbone.codes) == {"image", "sensor", "text"}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = recipe(tmp_path)["model"]
    data["streams"]["image"].pop("connector")
    with pytest.raises(ConfigError, match=r"its features have width 21, the latents read input_width 24"):
        ModelConfig.parse(data)
    data["streams"].pop("image")
    with pytest.raises(ConfigError, match="enters by 'latent', which needs the backbone 'latent'; found 'merge'"):
        ModelConfig.parse({**data, "backbone": "merge"})
    with pytest.raises(ConfigError, match="do not divide the widths"):
        LatentConfig.parse({"width": 30, "heads": 4})
    with pytest.raises(ConfigError, match="head query_token: stream 'sensor' has no table of tokens"):
        model = ModelConfig.parse({**data, "heads": {"q": {"use": "query_token", "stream": "sensor"}}})
        MultimodalModel(model, 262)


def test_padding_is_not_read_and_an_empty_memory_gives_zeros() -> None:
    torch.manual_seed(0)
    block = LatentBlock(8, 6, (8, 8), 2, 1)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    is_valid = torch.tensor([[True, True, False, False], [False] * 4])
    found = block(x, memory, is_valid)
    torch.testing.assert_close(found[:1], block(x[:1], memory[:1, :2]))
    zeros = x[1] + block.out_proj(torch.zeros(3, 8))
    torch.testing.assert_close(found[1], zeros + block.mlp(block.mlp_norm(zeros)))


def test_queried_texts_have_logits_for_every_place() -> None:
    data = {
        "streams": {
            "text": {
                "modality": "text",
                "encoder": {"use": "embedding", "vocab_size": 262, "max_tokens": 12, "width": 16},
                "reader": {"use": "text", "bytes": True, "max_tokens": 12},
                "enters": "latent",
            }
        },
        "backbone": {"use": "latent", "latents": 4, "width": 16, "input_width": 16, "depth": 1},
        "heads": {"query_token": {"use": "query_token", "stream": "text", "qk_width": 16, "heads": 2}},
    }
    from polymodal.recipes.assemble import assemble
    from polymodal.recipes.schema import Recipe

    parts = assemble(Recipe.parse({"name": "q", "model": data, "stages": []}))
    made = parts.processor.batch([Sample("a", views={"text": pm.Text("abc")})])
    outputs = parts.network.eval()(to_device(made, torch.device("cpu")), {"merge"})
    assert outputs.queried["text"].shape == (1, 12, 262) and outputs.latents.shape == (1, 4, 16)
