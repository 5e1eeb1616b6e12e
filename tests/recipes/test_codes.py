"""Codes fitted to a stage's data before it: those of k-means over the drawn items, the same again, kept by a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import torch
from PIL import Image
from safetensors.torch import load_file

from polymodal.core.errors import ConfigError, DataError
from polymodal.models.encoders.quantised import Quantised, hierarchical_means
from polymodal.recipes import codes
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import stage_sources, train
from polymodal.training import loop

BASE = {"use": "frame_temporal", "width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}
CENTRES = "streams.video.encoder.centres_KC"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, lines = tmp_path_factory.mktemp("videos"), np.random.default_rng(0), []
    for index in range(12):
        frames = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
        frames[0].save(folder / f"{index}.gif", save_all=True, append_images=frames[1:], duration=250)
        content = [{"type": "video", "path": f"{index}.gif"}, {"type": "text", "text": "What moves?"}]
        lines.append(
            {
                "id": f"g{index}",
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a cube"}],
            }
        )
    lines.append({**lines[0], "id": "lost", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "absent.gif"}]}, {"role": "assistant", "content": "?"},
    ]})  # fmt: skip
    small_recipes.write_lines(folder / "videos.jsonl", lines)
    return folder


def recipe(root: Path, **changes: Any) -> Any:
    encoder = {"use": "quantised", "base": BASE, "branches": 2, "levels": 2, "width": 16}
    stage = small_recipes.stage(
        **{"train": ["streams.video", "backbone"], "data": ["videos.jsonl"], "fit_codes": {"video": 8}, **changes}
    )
    made = small_recipes.decoder_recipe(root, stage, max_bad_rate=0.5)
    made["model"]["streams"] = {"video": {"modality": "video", "encoder": encoder, "enters": "sequence"}}
    made["model"]["heads"] = {"answer": {"use": "next_token"}}
    return made


def test_centres_are_those_of_the_frozen_encoders_features(data: Path, tmp_path: Path) -> None:
    parsed, notes = load_recipe(recipe(data)), []
    found = []
    for folder in ("a", "b"):
        torch.manual_seed(0)
        parts = assemble(parsed)
        stage = parsed.stages[0]
        codes.fit_codes(parts, stage, stage_sources(parsed, stage), tmp_path / folder, notes.append)
        found.append(parts.network.modules_of("video").encoder.centres_KC)
    assert torch.equal(*found)
    assert notes[0].startswith("tune: 4 codes of video fitted to ")
    torch.manual_seed(0)
    encoder = assemble(parsed).network.modules_of("video").encoder.base.eval()
    source, features = stage_sources(parsed, stage)[0], []
    for place in np.random.default_rng(parsed.seed).permutation(13).tolist():
        if place != 12 and len(features) < 8:
            (item,) = parts.processor.load(parts.processor.plan(source[place])).inputs["video"]
            with torch.no_grad():
                one = encoder(torch.from_numpy(np.stack(item.units)), torch.tensor(item.lengths))
            features.append(one.x_UND[one.is_valid_UN])
    torch.testing.assert_close(found[0], hierarchical_means(torch.cat(features), 2, 2, parsed.seed))


def test_an_interrupted_run_keeps_its_codes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(load_recipe(recipe(data)), tmp_path / "whole", quiet=True)
    step, fitted, fit = loop.StageRun._one_step, [], Quantised.fit

    def dies(self: Any, micro: Any) -> Any:
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self, micro)

    monkeypatch.setattr(Quantised, "fit", lambda *args, **more: fitted.append(1) or fit(*args, **more))
    monkeypatch.setattr(loop.StageRun, "_one_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe(data)), tmp_path / "broken", quiet=True)
    monkeypatch.setattr(loop.StageRun, "_one_step", step)
    train(load_recipe(recipe(data)), tmp_path / "broken", quiet=True)
    assert len(fitted) == 1, "what was fitted once is read again"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    fresh = assemble(load_recipe(recipe(data))).network.state_dict()[CENTRES]
    assert not torch.equal(one[CENTRES], fresh)
    assert not list(tmp_path.rglob("codes-*.safetensors")), "the centres are among the weights"


def test_streams_without_codes_and_data_without_items_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages.tune.fit_codes: unknown stream with a quantised encoder 'image'"):
        load_recipe(recipe(data, fit_codes={"image": 8}))
    with pytest.raises(ConfigError, match=r"fit_codes.video: .*greater than 0"):
        load_recipe(recipe(data, fit_codes={"video": 0}))
    parts = assemble(load_recipe(recipe(data)))
    with pytest.raises(DataError, match="found no item of the stream 'video' in the stage's data"):
        codes.fit_codes(parts, parts.recipe.stages[0], [], tmp_path, print)
