"""Encoders, connectors and language models of different published checkpoints, joined by a recipe alone.

Every pair is proved by ``check``, trained, saved and loaded again, and must then need none of its checkpoints.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import published_parts
import pytest
import torch

import polymodal as pm
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe

NEW: dict[str, dict[str, Any]] = {
    "linear": {"use": "linear"},
    "mlp": {"use": "mlp"},
    "qformer": {"use": "qformer", "queries": 3, "width": 16, "depth": 2, "heads": 2},
    "perceiver": {"use": "perceiver", "latents": 4, "width": 16, "depth": 1, "heads": 2},
    "pixel_shuffle": {"use": "pixel_shuffle", "factor": 2},
    "pool": {"use": "pool", "factor": 2, "over": "grid"},
    "pool in order": {"use": "pool", "factor": 3},
}
MODALITY = {
    **dict.fromkeys(("clip", "siglip", "vit", "dinov2", "resnet", "llava", "beit"), "image"),
    **dict.fromkeys(("whisper", "qwen2_audio", "wav2vec2", "hubert"), "audio"),
    **dict.fromkeys(("videomae", "timesformer"), "video"),
    "patchtst": "sensor",
}
PAIRS = [
    ("clip", "linear", "llama"),
    ("siglip", "qformer", "qwen2"),
    ("vit", "perceiver", "qwen3"),
    ("dinov2", "pixel_shuffle", "gpt2"),
    ("resnet", "pool", "opt"),
    ("whisper", "pool in order", "qwen2"),
    ("wav2vec2", "linear", "gpt2"),
    ("videomae", "perceiver", "mistral"),
    ("patchtst", "mlp", "llama"),
    ("llava", "llava", "mistral"),
    ("clip", "llava", "llava"),
    ("whisper", "mlp", "llava"),
    ("siglip", "mlp", "olmo2"),
]
MORE = [
    ("siglip", "llava", "llama"),
    ("dinov2", "llava", "llava"),
    ("hubert", "qformer", "llama"),
    ("hubert", "mlp", "llava"),
    ("timesformer", "mlp", "qwen3"),
    ("timesformer", "qformer", "gpt2"),
    ("videomae", "pool in order", "llava"),
    ("patchtst", "perceiver", "opt"),
    ("qwen2_audio", "linear", "qwen3"),
    ("llava", "qformer", "gpt2"),
    ("llava", "llava", "olmo2"),
    ("vit", "pool", "llava"),
    ("resnet", "linear", "mistral"),
    ("beit", "mlp", "qwen2"),
    ("wav2vec2", "perceiver", "olmo2"),
]


class Folders(dict[str, Path]):
    """Checkpoint folders, each written when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        self[name] = published_parts.write(name, self.root / name)
        return self[name]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_parts.write_media(tmp_path_factory.mktemp("media"))


def part(folder: Path, name: str) -> dict[str, Any]:
    return {"from": str(folder), **({"use": "transformers"} if name in published_parts.ADAPTED else {})}


def stage(modality: str, **changes: Any) -> dict[str, Any]:
    data = {
        "name": "tune", "train": ["streams.*.connector", "backbone"], "data": [f"{modality}.jsonl"],
        "objectives": {"next_token": 1.0}, "batch": {"tokens": 400, "buffer": 4}, "steps": 2,
        "optimizer": {"use": "adamw", "lr": 1.0e-3},
    }  # fmt: skip
    return {**data, **changes}


def joined(eyes: str, connector: str, mind: str, folders: Any, data: Path) -> dict[str, Any]:
    """The recipe of a pair."""
    modality = MODALITY[eyes]
    stream = {
        "modality": modality,
        "encoder": part(folders[eyes], eyes),
        "connector": NEW[connector] if connector in NEW else {"from": str(folders[connector])},
        "enters": "sequence",
    }
    model: dict[str, Any] = {"streams": {modality: stream}, "backbone": part(folders[mind], mind)}
    if mind in published_parts.ADAPTED:
        model["heads"] = {"text": {"use": "next_token"}}
    return {"name": f"{eyes}-{mind}", "data_root": str(data), "model": model, "stages": [stage(modality)]}


def asked(modality: str, data: Path) -> list[Any]:
    media = {
        "image": lambda: pm.Image(data / "0.png"),
        "audio": lambda: pm.Audio(data / "0.wav"),
        "video": lambda: pm.Video(data / "0.gif"),
        "sensor": lambda: pm.Sensor(data / "0.npy", rate_hz=50),
    }
    return [media[modality](), "What is it?"]


def prove(recipe: pm.Recipe, modality: str, data: Path, out: Path, *sources: Path) -> pm.Model:
    """Check, train, load, take the sources away, load again: the same answers. Returns the model of the run."""
    report = pm.check(recipe)
    assert report.is_ok, report.failed
    start = {name: value.clone() for name, value in assemble(recipe).network.state_dict().items()}
    pm.train(recipe, out, quiet=True)
    one = pm.load(out)
    for source in sources:
        shutil.rmtree(source)
    other = pm.load(out)
    parts = asked(modality, data)
    assert np.isfinite(one.logits(parts)).all()
    assert np.array_equal(one.logits(parts), other.logits(parts))
    assert not np.array_equal(one.logits(parts), one.logits(parts[1:]))
    assert one.chat(*parts, max_new_tokens=6).tokens == other.chat(*parts, max_new_tokens=6).tokens
    moved = {name for name, value in other.network.state_dict().items() if not torch.equal(value, start[name])}
    assert any(".connector." in name for name in moved) and any(name.startswith("backbone.") for name in moved)
    assert not [name for name in moved if ".encoder." in name]
    return other


def test_there_are_enough_pairs() -> None:
    assert len({*PAIRS, *MORE}) == len(PAIRS) + len(MORE) >= 20
    parts = [{pair[place] for pair in (*PAIRS, *MORE)} for place in range(3)]
    assert parts[0] == set(MODALITY) and parts[1] == {*NEW, "llava"}
    assert parts[2] == {"llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "llava", "olmo2"}


@pytest.mark.parametrize(
    ("eyes", "connector", "mind"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_a_pair_trains_and_answers_the_same_when_it_is_loaded(
    eyes: str, connector: str, mind: str, folders: Folders, data: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(joined(eyes, connector, mind, folders, data))
    modality = MODALITY[eyes]
    model = prove(recipe, modality, data, tmp_path / "run")
    if eyes not in published_parts.ADAPTED:
        # The encoder is frozen: it sees what the checkpoint's own sees.
        mine = model.features(asked(modality, data)[:1])[0]
        theirs = pm.load(folders[eyes]).features(asked(modality, data)[:1])[0]
        assert np.array_equal(mine.features, theirs.features)


@pytest.mark.slow
@pytest.mark.parametrize(("eyes", "modality"), [("dinov2", "image"), ("wav2vec2", "audio"), ("patchtst", "sensor")])
def test_clips_text_tower_meets_another_encoder_in_a_shared_space(
    eyes: str, modality: str, folders: Folders, data: Path, tmp_path: Path
) -> None:
    streams = {
        modality: {"modality": modality, "encoder": part(folders[eyes], eyes)},
        "text": {"modality": "text", "encoder": part(folders["clip"], "clip")},
    }
    model = {"streams": streams, "backbone": "none", "heads": {"space": {"use": "projection", "dim": 8}}}
    pairs = {"infonce": {"pairs": [[modality, "text"]]}}
    align = stage(modality, train=["heads"], data=[f"{modality}-views.jsonl"], objectives=pairs, batch={"samples": 4})
    recipe = load_recipe({"name": "space", "data_root": str(data), "model": model, "stages": [align]})
    report = pm.check(recipe)
    assert report.is_ok, report.failed
    pm.train(recipe, tmp_path / "run", quiet=True)
    parts = [asked(modality, data)[0], "a red dog"]
    one, other = pm.load(tmp_path / "run"), pm.load(tmp_path / "run")
    assert one.embed(parts).shape == (2, 8) and np.array_equal(one.embed(parts), other.embed(parts))
    theirs = pm.load(folders["clip"]).features(["a red dog"])[0].pooled
    assert np.array_equal(one.features(["a red dog"])[0].pooled, theirs)


@pytest.mark.parametrize(("eyes", "connector", "mind"), [PAIRS[1], PAIRS[10], PAIRS[12]])
def test_a_run_needs_no_checkpoint_any_more(eyes: str, connector: str, mind: str, data: Path, tmp_path: Path) -> None:
    own = Folders(tmp_path)
    recipe = load_recipe(joined(eyes, connector, mind, own, data))
    prove(recipe, MODALITY[eyes], data, tmp_path / "run", *own.values())
    assert not any(folder.exists() for folder in own.values())
