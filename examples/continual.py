"""Continual learning: pictures first, movements later, with the same head and the same merge.

A model learns to name the colour in a picture. Then it learns to name a movement from a motion sensor, from samples
without any picture. Trained plainly, the second task takes the shared weights away from the first. Elastic weight
consolidation holds each of them as firmly as the pictures need it, and both tasks stand.

    python examples/continual.py    # three seeds: 70 CPU seconds
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scene import COLOURS, MOTIONS, draw_thing, movement, picture, write_samples
from trial import HERE, Claim, Example, accuracy, main, train

import polymodal as pm
from polymodal.core.config import load_yaml
from polymodal.training.weights import read_weights

RECIPE = "continual.yaml"
KINDS = ("pictures", "movements")


def make_sample(index: int, rng: np.random.Generator, kind: str) -> pm.Sample:
    """A picture with its colour, or a movement with its name."""
    thing = draw_thing(rng)
    if kind == "pictures":
        return pm.Sample(f"{index}", views={"image": picture(thing, rng)}, label=tuple(COLOURS)[thing.colour])
    return pm.Sample(f"{index}", views={"sensor": movement(thing, rng)}, label=MOTIONS[thing.motion])


def make_data(folder: Path, seed: int, quick: bool) -> dict[str, list[pm.Sample]]:
    """Write the training sets; returns unseen samples of each kind."""
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        write_samples(folder / f"{kind}.jsonl", (make_sample(i, rng, kind) for i in range(100 if quick else 1200)))
    return {kind: [make_sample(i, rng, kind) for i in range(60 if quick else 400)] for kind in KINDS}


def without_consolidation() -> str:
    """The override that leaves the second stage its own objective alone."""
    stages = load_yaml((HERE / RECIPE).read_text(encoding="utf-8"), RECIPE)["stages"]
    return "stages.feel.objectives=" + json.dumps({"classify": stages[1]["objectives"]["classify"]})


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    tests = make_data(folder, seed, quick)
    short = ["stages.see.steps=3", "stages.feel.steps=3"] if quick else []
    scores = {}
    for arm, overrides in (("plain", [*short, without_consolidation()]), ("ewc", short)):
        model = train(RECIPE, folder, arm, seed, overrides)
        scores.update({f"{arm}_{kind}": accuracy(model, tests[kind]) for kind in KINDS})
    # Both arms begin with the same first stage.
    read_weights(model.network, folder / "runs" / "ewc" / "stages" / "00-see" / "weights.safetensors")
    scores["before"] = accuracy(model, tests["pictures"])
    return scores


EXAMPLE = Example(
    name="continual",
    title="Continual learning: colours in pictures, then movements from a sensor (10 classes)",
    rows={
        "before": "pictures, before movements are learned",
        "plain_pictures": "pictures, after plain training on movements",
        "ewc_pictures": "pictures, after training on movements with consolidation",
        "plain_movements": "movements, trained plainly",
        "ewc_movements": "movements, trained with consolidation",
    },
    claims=(
        Claim("the pictures were learned (0.95)", lambda s: s["before"] >= 0.95),
        Claim("plain training forgets most of them (at most 0.50)", lambda s: s["plain_pictures"] <= 0.5),
        Claim("consolidation keeps them (within 0.10 of before)", lambda s: s["ewc_pictures"] >= s["before"] - 0.1),
        Claim("and learns the movements (at least 0.90)", lambda s: s["ewc_movements"] >= 0.9),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
