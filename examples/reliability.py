"""Reliability: in every sample one of two views is noisy and wrong; which one changes from sample to sample.

Picture and sound each show a colour; the label is the colour of the clean one, the noisy one shows another. Dynamic
weights (one per view and sample, from both views) learn which to believe. Beside them: each view alone, and the
average of two experts, trained on clean samples (confidently wrong on noise that they never saw) or on the conflicts.
Control: the same conflicts without the noise. Then nothing tells which view is wrong, and nobody can beat one half.

    python examples/reliability.py    # three seeds, about 3 minutes on one core
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scene import COLOURS, draw_thing, picture, sound, write_samples
from trial import Claim, Example, accuracy, average, main, train, with_streams

import polymodal as pm

PICTURE_NOISE = {True: 90.0, False: 12.0}
SOUND_NOISE = {True: 0.25, False: 0.02}
VIEWS = ("image", "audio")
NAMES = tuple(COLOURS)


def make_sample(index: int, rng: np.random.Generator, kind: str) -> pm.Sample:
    """One sample: ``clean`` (both views right), ``conflict``, or ``unseen`` (a conflict that no noise gives away)."""
    seen, heard = draw_thing(rng), draw_thing(rng)
    wrong = VIEWS[rng.integers(2)]
    step = 0 if kind == "clean" else int(rng.integers(1, len(COLOURS)))
    heard = replace(heard, colour=(seen.colour + step) % len(COLOURS))
    views = {
        "image": picture(seen, rng, PICTURE_NOISE[kind == "conflict" and wrong == "image"]),
        "audio": sound(heard, rng, SOUND_NOISE[kind == "conflict" and wrong == "audio"]),
    }
    return pm.Sample(f"{index}", views=views, label=NAMES[heard.colour if wrong == "image" else seen.colour])


def make_data(folder: Path, seed: int, quick: bool) -> dict[str, list[pm.Sample]]:
    """Write the training sets; returns unseen samples of each kind."""
    rng = np.random.default_rng(seed)
    for kind in ("clean", "conflict", "unseen"):
        write_samples(folder / f"{kind}.jsonl", (make_sample(i, rng, kind) for i in range(200 if quick else 2400)))
    return {kind: [make_sample(i, rng, kind) for i in range(100 if quick else 600)] for kind in ("conflict", "unseen")}


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    tests = make_data(folder, seed, quick)
    steps = ["stages.learn.steps=3"] if quick else []
    half = steps or ["stages.learn.steps=100"]
    gate = train("reliability.yaml", folder, "gate", seed, steps)
    blind = train("reliability.yaml", folder, "unseen", seed, [*steps, "stages.learn.data=[unseen.jsonl]"])
    scores = {"gate": accuracy(gate, tests["conflict"]), "unseen": accuracy(blind, tests["unseen"])}
    for kind in ("conflict", "clean"):
        experts = []
        for view in VIEWS:
            only = [*half, with_streams("reliability.yaml", [view]), f"stages.learn.data=[{kind}.jsonl]"]
            model = train("reliability.yaml", folder, f"{view} {kind}", seed, only)
            asked = [sample.without(*(set(VIEWS) - {view})) for sample in tests["conflict"]]
            experts.append(model.classify(asked)[1])
            if kind == "conflict":
                scores[view] = accuracy(model, asked)
        found = average(experts).argmax(1)
        right = [NAMES[row] == sample.label for row, sample in zip(found, tests["conflict"], strict=True)]
        scores[f"average_{kind}"] = float(np.mean(right))
    return scores


EXAMPLE = Example(
    name="reliability",
    title="Reliability: one view is noisy and wrong; which one changes (6 colours)",
    rows={
        "gate": "dynamic weights over both views",
        "average_conflict": "average of two experts trained on the conflicts",
        "average_clean": "average of two experts trained on clean samples",
        "image": "picture alone",
        "audio": "sound alone",
        "unseen": "control: dynamic weights, no noise gives the wrong view away (chance .500)",
    },
    claims=(
        Claim("the learned gate reaches 0.95", lambda s: s["gate"] >= 0.95),
        Claim(
            "it beats averaging and each view alone",
            lambda s: s["gate"] > max(s["average_conflict"], s["average_clean"], s["image"], s["audio"]),
        ),
        Claim("without noise to see it stays at chance (0.44 to 0.56)", lambda s: 0.44 <= s["unseen"] <= 0.56),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
