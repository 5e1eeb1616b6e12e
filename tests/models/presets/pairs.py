"""Pictures and the texts that go with them, for parity tests of models of pairs."""

from __future__ import annotations

import numpy as np
import PIL.Image

import polymodal as pm

TEXTS = ["a red dog", "what is it on the grass?", "cats"]
_RNG = np.random.default_rng(0)
PICTURES = [
    PIL.Image.fromarray(_RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((24, 24), (30, 64), (90, 40))
]
SAMPLES = [
    pm.Sample(str(i), views={"text": pm.Text(text), "image": pm.Image(picture)})
    for i, (text, picture) in enumerate(zip(TEXTS, PICTURES, strict=True))
]
