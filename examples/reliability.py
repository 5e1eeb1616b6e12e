"""Reliability: in every sample one of two views is noisy and wrong; which one changes from sample to sample.

Picture and sound each show a colour; the label is the colour of the clean one, the noisy one shows another. Dynamic
weights (one per view and sample, from both views) learn which to believe. Beside them: an expert for each view, trained
on clean samples or on clean and noisy ones (always on what the view itself shows), alone and averaged.
Control: the same conflicts without the noise. Then nothing tells which view is wrong, and nobody can beat one half.

    python examples/reliability.py    # three seeds: 200 CPU seconds
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scene import COLOURS, draw_thing, picture, sound, write_samples
from trial import Claim, Example, accuracy, average, main, train, with_streams

import polymodal as pm

PICTURE_NOISE = {True: 60.0, False: 12.0}
SOUND_NOISE = {True: 0.12, False: 0.02}
VIEWS = ("image", "audio")
NAMES = tuple(COLOURS)
EXPERTS = ("clean", "noisy")
"""What the experts of a single view are trained on."""


def make_sample(index: int, rng: np.random.Generator, kind: str) -> pm.Sample:
    """One sample.

    Kinds: ``clean`` (both views right), ``noisy`` (both right, one of them noisy), ``conflict`` (one of them noisy and
    wrong), ``unseen`` (one of them wrong, and no noise gives it away).
    """
    seen, heard = draw_thing(rng), draw_thing(rng)
    worse = VIEWS[rng.integers(2)]
    step = int(rng.integers(1, len(COLOURS))) if kind in ("conflict", "unseen") else 0
    heard = replace(heard, colour=(seen.colour + step) % len(COLOURS))
    is_noisy = {view: kind in ("noisy", "conflict") and view == worse for view in VIEWS}
    views = {
        "image": picture(seen, rng, PICTURE_NOISE[is_noisy["image"]]),
        "audio": sound(heard, rng, SOUND_NOISE[is_noisy["audio"]]),
    }
    return pm.Sample(f"{index}", views=views, label=NAMES[heard.colour if worse == "image" else seen.colour])


def make_data(folder: Path, seed: int, quick: bool) -> dict[str, list[pm.Sample]]:
    """Write the training sets; returns unseen samples of each kind."""
    rng = np.random.default_rng(seed)
    for kind in ("conflict", "unseen", *EXPERTS):
        write_samples(folder / f"{kind}.jsonl", (make_sample(i, rng, kind) for i in range(200 if quick else 2000)))
    return {kind: [make_sample(i, rng, kind) for i in range(100 if quick else 600)] for kind in ("conflict", "unseen")}


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    tests = make_data(folder, seed, quick)
    steps = ["stages.learn.steps=3"] if quick else []
    short = steps or ["stages.learn.steps=80"]
    gate = train("reliability.yaml", folder, "gate", seed, steps)
    blind = train("reliability.yaml", folder, "unseen", seed, [*steps, "stages.learn.data=[unseen.jsonl]"])
    scores = {"gate": accuracy(gate, tests["conflict"]), "unseen": accuracy(blind, tests["unseen"])}
    for kind in EXPERTS:
        chances = {}
        for view in VIEWS:
            only = [*short, with_streams("reliability.yaml", [view]), f"stages.learn.data=[{kind}.jsonl]"]
            expert = train("reliability.yaml", folder, f"{view}-{kind}", seed, only)
            asked = [sample.without(*(set(VIEWS) - {view})) for sample in tests["conflict"]]
            chances[view] = expert.classify(asked)[1]
            scores[f"{view}_{kind}"] = _right(chances[view], tests["conflict"])
        scores[f"average_{kind}"] = _right(average([*chances.values()]), tests["conflict"])
    return scores


def _right(chances_SC: np.ndarray, samples: list[pm.Sample]) -> float:
    found = [NAMES[row] for row in chances_SC.argmax(1)]
    return float(np.mean([name == sample.label for name, sample in zip(found, samples, strict=True)]))


EXAMPLE = Example(
    name="reliability",
    title="Reliability: one view is noisy and wrong; which one changes (6 colours)",
    rows={
        "gate": "dynamic weights over both views",
        "average_noisy": "average of two experts trained on clean and noisy samples",
        "average_clean": "average of two experts trained on clean samples",
        "image_noisy": "picture alone (clean and noisy)",
        "audio_noisy": "sound alone (clean and noisy)",
        "image_clean": "picture alone (clean)",
        "audio_clean": "sound alone (clean)",
        "unseen": "control: dynamic weights, no noise gives the wrong view away (chance .500)",
    },
    claims=(
        Claim("the learned gate reaches 0.95", lambda s: s["gate"] >= 0.95),
        Claim(
            "it beats averaging and each view alone",
            lambda s: s["gate"] > max(score for name, score in s.items() if name not in ("gate", "unseen")),
        ),
        Claim(
            "without noise to see it stays at chance (mean 0.44 to 0.56)",
            lambda s: 0.44 <= s["unseen"] <= 0.56,
            on_mean=True,
        ),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
