"""Ambiguity: "apple" is a fruit before leaves and a computer before a desk; word and picture decide it together.

Eight words with two senses each (16 classes). A sentence holds the word; the picture holds some thing, which tells
nothing, before a background of one of two kinds. Text alone can only guess the sense, the picture alone only the word.
Controls: the pictures shuffled in the test, or in training. One more row keeps the example honest: a merge that merely
adds solves it too. Ambiguity shows that both views are needed, not that they interact; see ``interaction.py`` for that.

    python examples/ambiguity.py      # three seeds: 91 CPU seconds
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scene import SIDE_PX, draw_thing, picture, shuffled, write_samples
from trial import Claim, Example, accuracy, main, train, with_streams

import polymodal as pm

WORDS = ("apple", "bat", "crane", "mouse", "jaguar", "seal", "plant", "amazon")
SENSES = ("in nature", "made by people")
SENTENCES = ("look, the {word}", "this is my {word}", "I have seen that {word} before", "a {word}!")


def make_sample(index: int, rng: np.random.Generator) -> pm.Sample:
    word, sense = WORDS[rng.integers(len(WORDS))], int(rng.integers(2))
    sentence = SENTENCES[rng.integers(len(SENTENCES))].format(word=word)
    pixels = picture(draw_thing(rng), rng).source.astype(float)
    is_ground = np.abs(pixels - 40.0).max(axis=2) < 60.0
    pixels[is_ground] += background(sense, rng)[is_ground]
    views = {"text": pm.Text(sentence), "image": pm.Image(np.clip(pixels, 0, 255).astype(np.uint8))}
    return pm.Sample(f"{index}", views=views, label=f"{word} {SENSES[sense]}")


def background(sense: int, rng: np.random.Generator) -> np.ndarray:
    """Soft blotches in leaf colours, or straight bars in wall colours: float ``[24, 24, 3]``."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    if sense == 0:
        centres = rng.uniform(0, SIDE_PX, (6, 2))
        pattern = sum(np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 12.0) for cy, cx in centres)
    else:
        along = y if rng.integers(2) else x
        pattern = ((along + rng.integers(6)) % 6 < 3).astype(float)
    tint = np.array([0.5, 1.0, 0.3] if sense == 0 else [0.8, 0.8, 1.0])
    return 90.0 * np.clip(pattern, 0, 1)[..., None] * tint * rng.uniform(0.7, 1.0, 3)


def make_data(folder: Path, seed: int, quick: bool) -> list[pm.Sample]:
    """Write the training set, as it is and with shuffled pictures; returns the unseen samples."""
    rng = np.random.default_rng(seed)
    samples = [make_sample(i, rng) for i in range(200 if quick else 2000)]
    write_samples(folder / "train.jsonl", samples)
    write_samples(folder / "shuffled.jsonl", shuffled(samples, "image", rng))
    return [make_sample(i, rng) for i in range(100 if quick else 600)]


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    tests = make_data(folder, seed, quick)
    steps = ["stages.learn.steps=3"] if quick else []
    both = train("ambiguity.yaml", folder, "both", seed, steps)
    scores = {
        "both": accuracy(both, tests),
        "shuffled_test": accuracy(both, shuffled(tests, "image", np.random.default_rng(seed))),
    }
    for view, other in (("text", "image"), ("image", "text")):
        alone = [*steps, with_streams("ambiguity.yaml", [view])]
        model = train("ambiguity.yaml", folder, view, seed, alone)
        scores[view] = accuracy(model, [sample.without(other) for sample in tests])
    broken = train("ambiguity.yaml", folder, "shuffled", seed, [*steps, "stages.learn.data=[shuffled.jsonl]"])
    added = train("ambiguity.yaml", folder, "sum", seed, [*steps, "model.backbone.fusion=sum"])
    return {**scores, "shuffled_train": accuracy(broken, tests), "sum": accuracy(added, tests)}


EXAMPLE = Example(
    name="ambiguity",
    title='Ambiguity: "apple" before leaves or on a desk (16 classes)',
    rows={
        "both": "word and picture together",
        "text": "word alone (at best .500)",
        "image": "picture alone (at best .125)",
        "shuffled_test": "control: pictures shuffled in the test (chance .500)",
        "shuffled_train": "control: pictures shuffled in training (chance .500)",
        "sum": "for comparison: a merge that only adds",
    },
    claims=(
        Claim("together they reach 0.95", lambda s: s["both"] >= 0.95),
        Claim("the word alone fails (at most 0.60)", lambda s: s["text"] <= 0.60),
        Claim("the picture alone fails (at most 0.20)", lambda s: s["image"] <= 0.20),
        Claim(
            "with shuffled pictures it falls to the word alone (0.40 to 0.60)",
            lambda s: all(0.40 <= s[name] <= 0.60 for name in ("shuffled_test", "shuffled_train")),
        ),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
