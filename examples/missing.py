"""Missing modalities: one model for every subset of three noisy views.

Image, sound and points of one thing; the class is its colour (6). The noise is heavy: each view shows, every so often,
some other thing, and nothing in it tells when. No view suffices, and they must be weighed against each other.

One model is trained with modality dropout and a learned token for what is missing, and is asked with every subset.
Beside it stand a model dedicated to each subset, trained on that alone, and one model trained without dropout, for
which what is missing is zeros: it leans on whatever was strongest.

    python examples/missing.py        # three seeds: 252 CPU seconds
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from scene import COLOURS, cloud, draw_thing, picture, sound, write_samples
from trial import Claim, Example, accuracy, main, train, with_streams

import polymodal as pm

VIEWS = ("image", "audio", "points")
ASTRAY = {"image": 0.4, "audio": 0.4, "points": 0.45}
"""How often a view shows some other thing: alone it can be right in .667, .667 and .625 of the samples."""
SUBSETS = tuple(subset for size in (1, 2, 3) for subset in itertools.combinations(VIEWS, size))
ALL = "+".join(VIEWS)


def make_sample(index: int, rng: np.random.Generator) -> pm.Sample:
    """A sample whose views each show, with a stated chance, some other thing."""
    thing = draw_thing(rng)
    renderers = {"image": picture, "audio": sound, "points": cloud}
    shown = {view: draw_thing(rng) if rng.random() < ASTRAY[view] else thing for view in VIEWS}
    views = {view: renderers[view](shown[view], rng) for view in VIEWS}
    return pm.Sample(f"{index}", views=views, label=tuple(COLOURS)[thing.colour])


def make_data(folder: Path, seed: int, quick: bool) -> list[pm.Sample]:
    """Write the training set; returns the unseen samples."""
    rng = np.random.default_rng(seed)
    write_samples(folder / "train.jsonl", (make_sample(i, rng) for i in range(200 if quick else 2000)))
    return [make_sample(i, rng) for i in range(100 if quick else 600)]


def with_only(samples: list[pm.Sample], subset: tuple[str, ...]) -> list[pm.Sample]:
    """The samples without the other views."""
    return [sample.without(*(set(VIEWS) - set(subset))) for sample in samples]


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    tests = make_data(folder, seed, quick)
    steps = ["stages.learn.steps=4"] if quick else []
    # Dropout hides two of five views, and there are seven subsets to learn: this model gets twice the steps.
    dropout = train("missing.yaml", folder, "dropout", seed, steps or ["stages.learn.steps=180"])
    scores = {}
    for subset in SUBSETS:
        name = "+".join(subset)
        model = train("missing.yaml", folder, name, seed, [*steps, with_streams("missing.yaml", subset)])
        asked = with_only(tests, subset)
        scores[f"dropout {name}"] = accuracy(dropout, asked)
        scores[f"dedicated {name}"] = accuracy(model, asked)
    # The model dedicated to all views is the model trained without dropout.
    for subset in SUBSETS[:-1]:
        scores[f"zeros {'+'.join(subset)}"] = accuracy(model, with_only(tests, subset))
    return scores


def _rows() -> dict[str, str]:
    names = ["+".join(subset) for subset in SUBSETS]
    rows = {f"dropout {name}": f"one model, dropout and learned token: {name}" for name in names}
    rows |= {f"dedicated {name}": f"dedicated model: {name}" for name in names}
    rows |= {f"zeros {name}": f"control: no dropout, zeros for the missing: {name}" for name in names[:-1]}
    return rows


def _near_dedicated(scores: dict[str, float]) -> bool:
    return all(scores[f"dropout {'+'.join(s)}"] >= scores[f"dedicated {'+'.join(s)}"] - 0.12 for s in SUBSETS)


EXAMPLE = Example(
    name="missing",
    title="Missing modalities: one model for every subset of three noisy views (6 colours, chance .167)",
    rows=_rows(),
    claims=(
        Claim("every subset is within 0.12 of the model dedicated to it", _near_dedicated),
        Claim(
            "all together are never below the best single view",
            lambda s: s[f"dropout {ALL}"] >= max(s[f"dropout {view}"] for view in VIEWS),
        ),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
