"""Binding through a hub: audio and text never meet in training, only each with images, and still find each other.

Four modalities, three kinds of pairs: image-text, image-audio, image-sensor, each from things of their own. The score
is what a sound (or a sensor recording) says about its thing by the nearest captions: colour and shape (24 classes), or
motion (4 classes). Controls: the same pairs trained directly; a hub whose image-audio pairs are shuffled; a model with
random weights; and the blind hub: a still image holds no motion, so sensor and text stay strangers.

    python examples/hub.py            # three seeds: 278 CPU seconds
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scene import (
    LABELS,
    Thing,
    caption,
    draw_thing,
    movement,
    picture,
    shuffled,
    sound,
    write_samples,
)
from trial import Claim, Example, main, train

import polymodal as pm

VIEWS: dict[str, Callable[[Thing, np.random.Generator], pm.Image | pm.Audio | pm.Sensor | pm.Text]] = {
    "image": lambda thing, rng: picture(thing, rng, noise=4.0, radius_px=6.0),
    "audio": sound,
    "sensor": movement,
    "text": lambda thing, rng: pm.Text(caption(thing, rng)),
}
HUB_PAIRS = (("image", "text"), ("image", "audio"), ("image", "sensor"))
DIRECT_PAIRS = (("audio", "text"), ("sensor", "text"))
PROMPTS = 12
"""Captions that stand for a class; their mean is its place in the space."""
CHOICES = 64
"""Captions among which a recording's motion is sought."""


def make_data(folder: Path, seed: int, quick: bool) -> list[tuple[Thing, pm.Sample]]:
    """Write the training pairs; returns unseen things with their sound and sensor recording."""
    rng = np.random.default_rng(seed)
    count = 200 if quick else 1600
    for pair in (*HUB_PAIRS, *DIRECT_PAIRS):
        things = [draw_thing(rng) for _ in range(count)]
        samples = [
            pm.Sample(f"{i}", views={name: VIEWS[name](thing, rng) for name in pair}) for i, thing in enumerate(things)
        ]
        write_samples(folder / f"{'_'.join(pair)}.jsonl", samples)
        if pair == ("image", "audio"):
            write_samples(folder / "image_audio_shuffled.jsonl", shuffled(samples, "audio", rng))
    tests = [draw_thing(rng) for _ in range(100 if quick else 600)]
    return [
        (thing, pm.Sample(f"test {i}", views={name: VIEWS[name](thing, rng) for name in ("audio", "sensor")}))
        for i, thing in enumerate(tests)
    ]


def nearest_class(model: pm.Model, tests: list[tuple[Thing, pm.Sample]]) -> float:
    """How often the nearest class of captions is the colour and shape of a sound."""
    rng = np.random.default_rng(0)
    prompts: dict[str, list[str]] = {label: [] for label in LABELS}
    while min(map(len, prompts.values())) < PROMPTS:
        thing = draw_thing(rng)
        if len(prompts[thing.label]) < PROMPTS:
            prompts[thing.label].append(caption(thing, rng))
    centres_CE = np.stack([model.embed(prompts[label]).mean(0) for label in LABELS])
    centres_CE -= centres_CE.mean(0)
    centres_CE /= np.linalg.norm(centres_CE, axis=1, keepdims=True)
    queries_SE = model.embed([sample.views["audio"] for _, sample in tests])
    found = ((queries_SE - queries_SE.mean(0)) @ centres_CE.T).argmax(1)
    return float(np.mean([LABELS[row] == thing.label for row, (thing, _) in zip(found, tests, strict=True)]))


def nearest_caption(model: pm.Model, tests: list[tuple[Thing, pm.Sample]]) -> float:
    """How often the nearest of 64 random captions tells the motion of a recording.

    Each recording has captions of its own: four motions against four class centres would be sixteen numbers, and where
    nothing was learned the score would be the luck of one draw.
    """
    rng = np.random.default_rng(0)
    things = [draw_thing(rng) for _ in range(10 * CHOICES)]
    captions_CE = model.embed([caption(thing, rng) for thing in things])
    queries_SE = model.embed([sample.views["sensor"] for _, sample in tests])
    similarity_SC = (queries_SE - queries_SE.mean(0)) @ (captions_CE - captions_CE.mean(0)).T
    hits = 0
    for row_C, (thing, _) in zip(similarity_SC, tests, strict=True):
        chosen = rng.choice(len(things), CHOICES, replace=False)
        hits += things[chosen[row_C[chosen].argmax()]].motion == thing.motion
    return hits / len(tests)


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    tests = make_data(folder, seed, quick)
    steps = ["stages.bind.steps=4"] if quick else []
    # The direct pairs have settled by then, and shuffled pairs have nothing to find.
    short = steps or ["stages.bind.steps=100"]
    broken = [*short, "stages.bind.data.1=image_audio_shuffled.jsonl"]
    hub = train("hub.yaml", folder, "hub", seed, steps)
    direct = train("hub.yaml", folder, "direct", seed, [*short, *_pairs(DIRECT_PAIRS)])
    apart = train("hub.yaml", folder, "shuffled", seed, broken)
    untrained = train("hub.yaml", folder, "untrained", seed, ["stages.bind.steps=1", "stages.bind.optimizer.lr=1.0e-9"])

    def hears(model: pm.Model) -> float:
        return nearest_class(model, tests)

    return {
        "hub": hears(hub),
        "direct": hears(direct),
        "shuffled": hears(apart),
        "untrained": hears(untrained),
        "blind_hub": nearest_caption(hub, tests),
        "blind_direct": nearest_caption(direct, tests),
    }


def _pairs(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    files = ", ".join(f"{first}_{second}.jsonl" for first, second in pairs)
    lists = ", ".join(f"[{first}, {second}]" for first, second in pairs)
    trained = ", ".join(f"streams.{name}" for name in dict.fromkeys(name for pair in pairs for name in pair))
    return [
        f"stages.bind.train=[{trained}, heads.space]",
        f"stages.bind.data=[{files}]",
        f"stages.bind.objectives={{infonce: {{pairs: [{lists}]}}}}",
    ]


EXAMPLE = Example(
    name="hub",
    title="Binding through a hub: sound finds its caption, having met images only",
    rows={
        "hub": "sound -> caption, bound through images (never trained)",
        "direct": "sound -> caption, trained directly",
        "shuffled": "control: image-audio pairs shuffled (chance .042)",
        "untrained": "control: random weights (chance .042)",
        "blind_hub": "control: sensor -> caption's motion, through still images (chance .250)",
        "blind_direct": "sensor -> caption's motion, trained directly",
    },
    claims=(
        Claim(
            "the pair never trained is within 0.10 of the pair trained directly",
            lambda s: s["hub"] >= s["direct"] - 0.10,
        ),
        Claim("shuffled pairs stay at chance (mean below 0.08)", lambda s: s["shuffled"] < 0.08, on_mean=True),
        Claim(
            "a hub that lacks the information stays at chance (mean 0.15 to 0.35)",
            lambda s: 0.15 < s["blind_hub"] < 0.35,
            on_mean=True,
        ),
        Claim("that information is there to be learned (directly above 0.90)", lambda s: s["blind_direct"] > 0.90),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
