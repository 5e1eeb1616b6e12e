"""Small recipes over small files on disk, images and sensors, for tests of training as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import toys
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
WORDS = tuple("a red or green or blue square, then it moves far up and down while nobody looks".split())  # noqa: SIM905


def write_data(folder: Path, num: int = 24) -> Path:
    """Files of every kind that the recipes below name; ``num`` samples of each. The same content every time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    captions, questions, views = [], [], []
    for index in range(num):
        name, colour = list(COLOURS.items())[index % 3]
        pixels = np.clip(rng.normal(colour, 20, size=(16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows = rng.normal(size=(int(rng.integers(8, 24)), 2)).astype(np.float32)
        np.save(folder / f"{index}.npy", rows)
        image, sensor = {"path": f"{index}.png"}, {"path": f"{index}.npy", "rate_hz": 50}
        said = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 12))))
        captions.append(_turn(f"c{index}", {"type": "image", **image}, "What is it?", f"{name}, {said}"))
        questions.append(
            _turn(f"q{index}", {"type": "sensor", **sensor}, f"Is it {said}?", "yes" if index % 2 else "no")
        )
        views.append({"id": f"v{index}", "views": {"image": image, "sensor": sensor, "text": name}, "label": name})
    for name, lines in {"captions": captions, "questions": questions, "views": views}.items():
        write_lines(folder / f"{name}.jsonl", lines)
    return folder


def _turn(id: str, media: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    content = [media, {"type": "text", "text": question}]
    return {"id": id, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stage(name: str = "tune", **changes: Any) -> dict[str, Any]:
    """A stage that trains a decoder and its connectors on packed captions and questions."""
    data = {
        "name": name,
        "train": ["streams.*.connector", "backbone"],
        "data": ["captions.jsonl", "questions.jsonl"],
        "objectives": {"next_token": 1.0},
        "batch": {"tokens": 160, "buffer": 8},
        "optimizer": {"use": "adamw", "lr": 3.0e-3},
        "steps": 4,
        "save_every": 2,
    }
    return {**data, **changes}


def decoder_recipe(root: Path, *stages: dict[str, Any], backbone: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Images and sensors in a decoder, with a shared space beside it."""
    transformer = {"width": 16, "depth": 1, "heads": 2, "norm": "rms", "rope_theta": 10000.0}
    transformer |= (backbone or {}).pop("transformer", {}) if backbone else {}
    model = {
        "streams": {
            "image": toys.stream("image"),
            "sensor": toys.stream("sensor"),
            "text": {"modality": "text", "encoder": {**toys.ENCODERS["text"], "max_tokens": 64}},
        },
        "backbone": {"use": "decoder", "max_tokens": 160, "transformer": transformer, **(backbone or {})},
        "heads": {"answer": {"use": "next_token"}, "space": {"use": "projection", "dim": 8}},
        "tokenizer": {"use": "bpe", "vocab_size": 280},
    }
    data = {"name": "small", "data_root": str(root), "model": model, "stages": list(stages) or [stage()]}
    return {**data, **changes}


def merge_recipe(root: Path, **changes: Any) -> Any:
    """Images and sensors merged into a classifier, with modality dropout."""
    enters = {"use": "merge", "dropout": 0.3, "missing": "learned"}
    model = {
        "streams": {name: toys.stream(name, enters=enters) for name in ("image", "sensor")},
        "backbone": {"use": "merge", "width": 16},
        "heads": {"colour": {"use": "class", "classes": list(COLOURS)}},
    }
    only = {
        "name": "classify", "train": ["streams", "backbone", "heads"], "data": ["views.jsonl"],
        "objectives": {"classify": 1.0}, "batch": {"samples": 6}, "steps": 4, "save_every": 2,
    }  # fmt: skip
    return {"name": "merged", "data_root": str(root), "model": model, "stages": [only], **changes}


def contrast_stage(**changes: Any) -> dict[str, Any]:
    """A stage that aligns images and sensors with text."""
    data = {
        "name": "contrast", "train": ["streams.*.encoder", "heads.space"], "data": ["views.jsonl"],
        "objectives": {"infonce": {"pairs": [["image", "text"], ["sensor", "text"]]}},
        "batch": {"samples": 6}, "steps": 4, "save_every": 2,
    }  # fmt: skip
    return {**data, **changes}
