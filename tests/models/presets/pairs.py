"""Pictures and the texts that go with them, for parity tests of models of pairs."""

from __future__ import annotations

import numpy as np
import PIL.Image

import polymodal as pm

TEXTS = ["a red dog", "what is it on the grass?", "cats"]


def pairs_of(*sizes: tuple[int, int]) -> tuple[list[PIL.Image.Image], list[pm.Sample]]:
    """Noise of the given heights and widths, and samples of each with its text."""
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    views = [{"text": pm.Text(text), "image": pm.Image(each)} for text, each in zip(TEXTS, pictures, strict=True)]
    return pictures, [pm.Sample(str(i), views=each) for i, each in enumerate(views)]


PICTURES, SAMPLES = pairs_of((24, 24), (30, 64), (90, 40))
