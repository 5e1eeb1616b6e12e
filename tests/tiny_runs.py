"""A tiny recipe over the scenes corpus, and finished run folders with random weights to try commands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import toys

from polymodal.data.scenes import make_scenes
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.training.weights import save_weights

SENSOR = {**toys.ENCODERS["sensor"], "num_channels": 6, "patch_size": 20}
AUDIO_READER = {"use": "audio", "rate_hz": 4000, "num_mels": 8, "max_s": 4.0}


def scenes_recipe(data_root: str | Path = "data", **changes: Any) -> dict[str, Any]:
    """All six modalities, a decoder and a shared space, two stages of one step each, as plain data."""
    model = toys.decoder_data(max_tokens=512)
    streams = model["streams"]
    streams["sensor"]["encoder"] = SENSOR
    streams["audio"]["reader"] = AUDIO_READER
    streams["text"] = {"modality": "text", "encoder": {**toys.ENCODERS["text"], "max_tokens": 256}}
    model["heads"]["space"] = {"use": "projection", "dim": 8, "streams": list(streams)}
    model["tokenizer"] = {"use": "bpe", "vocab_size": 300}
    pairs = [["image", "text"], ["audio", "text"], ["video", "text"], ["points", "text"], ["sensor", "text"]]
    stages = [
        {
            "name": "contrast", "train": ["streams.*.encoder", "heads.space"], "data": ["train/views.jsonl"],
            "objectives": {"infonce": {"pairs": pairs}}, "batch": {"samples": 10}, "steps": 1,
        },
        {
            "name": "instruct", "train": ["streams.*.connector", "backbone"], "data": ["train/questions.jsonl"],
            "objectives": {"next_token": 1.0}, "batch": {"tokens": 512}, "steps": 1,
        },
    ]  # fmt: skip
    tasks = [{"name": "val", "data": "val/questions.jsonl"}, {"name": "novel", "data": "novel/questions.jsonl"}]
    evaluate = [{"use": "questions", "max_new_tokens": 3, **task} for task in tasks]
    data = {"name": "tiny", "data_root": str(data_root), "model": model, "stages": stages, "evaluate": evaluate}
    return {**data, **changes}


def make_data(folder: Path) -> Path:
    """A corpus of a few scenes."""
    make_scenes(folder, 12, 6, 4)
    return folder


def make_run(folder: Path, data: Path, overrides: tuple[str, ...] = ()) -> Path:
    """A finished run folder of the tiny recipe, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(scenes_recipe(data), overrides)
    parts = assemble(recipe)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    parts.tokenizer.save(folder / "tokenizer.json")
    save_weights(parts.network, folder / "model.safetensors")
    return folder
