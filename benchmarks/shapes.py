"""The models that the benchmarks build, and made-up text for them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from benchmarks.harness import ROOT
from polymodal.core.batch import Example, Plan
from polymodal.core.parts import Text
from polymodal.core.samples import Message, Sample
from polymodal.modalities.text import Tokenizer, chat_format, train_bpe
from polymodal.models.layers import layout as layout_module

LENGTHS = (63, 116, 172, 473, 128, 82, 232, 52, 250, 178, 105, 155, 54, 52, 401, 192)
"""Sixteen draws of a lognormal (sigma 0.7): mean 169, max 473. Two batches of 8 pad 61 % as drawn, 44 % sorted."""


def decoder(width: int, depth: int, heads: int, mlp_dim: int, max_tokens: int = 1024) -> dict[str, Any]:
    """A Llama-shaped decoder."""
    stack = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, "norm": "rms", "activation": "silu"}
    stack |= {"gated": True, "bias": False, "rope_theta": 10_000.0}
    return {"use": "decoder", "chat": "turns", "max_tokens": max_tokens, "transformer": stack}


def text_recipe(backbone: dict[str, Any], vocab_size: int, **more: Any) -> dict[str, Any]:
    """A recipe of a text-only model."""
    model = {"tokenizer": {"use": "bpe", "vocab_size": vocab_size}, "backbone": backbone}
    return {"name": "benchmark", "model": {**model, "heads": {"answer": {"use": "next_token", "tied": True}}}, **more}


DECODERS = {
    "2M": (decoder(64, 2, 2, 128), 512),
    "12.5M": (decoder(384, 6, 6, 1024), 4864),
    "47M": (decoder(640, 8, 10, 1728), 9600),
}
"""Name -> decoder and vocabulary; '2M' is for trying a script out."""


def words(count: int, seed: int = 0) -> list[str]:
    """Made-up words of two to four syllables."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(count)]


def tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with (nearly) the given number of ids, trained on made-up words."""
    lexicon = words(4 * vocab_size)
    return train_bpe([" ".join(lexicon)] * 2, vocab_size, chat_format("turns").controls)


def plain_example(
    rng: np.random.Generator, length: int, vocab_size: int, supervised: float = 1.0, name: str = ""
) -> Example:
    """Random ids; the last ``supervised`` share of them are targets, the first never is."""
    ids = rng.integers(8, vocab_size, length).tolist()
    plan = Plan(f"length {length}", ids, [False] + [True] * (length - 1), [], {})
    return Example(plan, {}, {})


def dialogue(rng: np.random.Generator, lexicon: list[str], question: int, answer: int, name: str) -> Sample:
    """A question and an answer of so many words."""
    asked = " ".join(rng.choice(lexicon, question))
    said = " ".join(rng.choice(lexicon, answer))
    return Sample(name, (Message("user", (Text(asked),)), Message("assistant", (Text(said),))))


def vision_recipe(
    image_size: int, patch: int, vit: dict[str, int], connector: dict[str, Any], backbone: dict[str, Any]
) -> dict[str, Any]:
    """The model of a LLaVA-shaped recipe: a vision transformer, a connector, a decoder."""
    encoder = {"use": "vit", "image_size": image_size, "patch_size": patch, "activation": "gelu_tanh", **vit}
    stream = {"modality": "image", "encoder": encoder, "connector": connector, "enters": "sequence"}
    return {
        "tokenizer": {"use": "bpe", "vocab_size": 512},
        "streams": {"image": stream},
        "backbone": backbone,
        "heads": {"answer": {"use": "next_token", "tied": True}},
    }


def photos() -> list[Path]:
    """The photographs of ``coco-mini`` in the shared data folder (``POLYMODAL_SHARED_DATA``), or made-up JPEGs.

    Made-up pictures are smooth noise of 640 x 480 pixels, about as large as a photograph as JPEG.
    """
    shared = Path(os.environ.get("POLYMODAL_SHARED_DATA", ROOT.parent / "shared" / "data")) / "coco-mini" / "images"
    found = sorted(shared.glob("*.jpg"))
    return found or made_up_photos(Path(tempfile.gettempdir()) / "polymodal-benchmark-photos")


def made_up_photos(folder: Path, count: int = 80) -> list[Path]:
    """Write (once) ``count`` JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03d}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        if not path.is_file():
            coarse = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            picture = PIL.Image.fromarray(coarse).resize((640, 480), PIL.Image.Resampling.BICUBIC)
            picture.save(path, quality=95)
    return paths


@contextmanager
def padding_computed() -> Iterator[None]:
    """While open, transformers compute padding as well: the plain padded batch, to compare with."""
    before, layout_module._MIN_PADDING = layout_module._MIN_PADDING, 1.0
    try:
        yield
    finally:
        layout_module._MIN_PADDING = before
