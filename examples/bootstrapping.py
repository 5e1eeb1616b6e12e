"""Bootstrapping captions (CapFilt): a few clean pairs, many noisy ones, and a model that mends them.

Pictures come with captions from the "web", of which four in ten belong to another picture. A small BLIP learns from all
of them and is then finetuned on a few clean pairs, to write and to judge, as BLIP is on COCO. The captioner tells every
picture anew, the filter throws out what does not fit, and a fresh captioner learns from what is left.

    python examples/bootstrapping.py    # three seeds: 300 CPU seconds
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scene import COLOURS, QUADRANTS, draw_thing, picture, shuffled, write_samples
from trial import HERE, Claim, Example, main, train

import polymodal as pm
from polymodal.core.config import load_yaml
from polymodal.data.sources import open_source
from polymodal.inference.sampling import Sampling
from polymodal.recipes.capfilt import EVEN, capfilt
from polymodal.training.weights import read_weights

RECIPE = "bootstrapping.yaml"
NOISE = 0.4
"""Share of the captions that belong to another picture."""
SEED, WEB, VAL = 200, 1500, 300
SIZES = {"small": 3.0, "large": 5.5}
"""Radius of a thing in pixels; its index stands in the place of the motion, which no picture shows."""
_TEMPLATES = ("a {size} {colour} thing in the {quadrant}", "{quadrant}: a thing that is {colour} and {size}")


def facts(text: str) -> tuple[str, ...]:
    """The colours, sizes and quadrants that a caption names."""
    return tuple(word for words in (COLOURS, SIZES, QUADRANTS) for word in words if word in text)


def make_pairs(name: str, count: int, rng: np.random.Generator) -> list[pm.Sample]:
    """Pictures with true captions."""
    found = []
    for index in range(count):
        thing = draw_thing(rng)
        size = tuple(SIZES)[thing.motion % len(SIZES)]
        told = {"size": size, "colour": tuple(COLOURS)[thing.colour], "quadrant": QUADRANTS[thing.quadrant]}
        text = _TEMPLATES[rng.integers(len(_TEMPLATES))].format(**told)
        views = {"image": picture(thing, rng, radius_px=SIZES[size]), "text": pm.Text(text)}
        found.append(pm.Sample(f"{name}-{index}", views=views, meta={"facts": list(facts(text))}))
    return found


def corrupted(samples: Sequence[pm.Sample], rng: np.random.Generator) -> list[pm.Sample]:
    """The samples, a share of whose captions are dealt out anew; ``meta.facts`` stays true."""
    chosen = rng.permutation(len(samples))[: round(NOISE * len(samples))]
    dealt = dict(zip(chosen.tolist(), shuffled([samples[i] for i in chosen], "text", rng), strict=True))
    return [dealt.get(index, sample) for index, sample in enumerate(samples)]


def make_data(folder: Path, seed: int, quick: bool) -> list[pm.Sample]:
    """Write the clean pairs and the noisy ones; returns unseen samples."""
    rng = np.random.default_rng(seed)
    share = 0.1 if quick else 1.0
    sets = {name: make_pairs(name, round(share * count), rng) for name, count in (("seed", SEED), ("web", WEB))}
    write_samples(folder / "seed.jsonl", sets["seed"])
    write_samples(folder / "web.jsonl", corrupted(sets["web"], rng))
    return make_pairs("val", round(share * VAL), rng)


def steps(quick: bool) -> list[str]:
    """The overrides that make every stage of the recipe three steps long."""
    names = ("pretrain", "write", "judge")
    return [f"stages.{name}.steps=3" for name in names] if quick else []


def alone(data: str, quick: bool) -> list[str]:
    """The overrides that leave a fresh captioner and one stage, on the clean pairs and these."""
    stage = load_yaml((HERE / RECIPE).read_text(encoding="utf-8"), RECIPE)["stages"][0]
    only = {"train": ["streams", "backbone", "heads.words"], "objectives": {"caption": 1.0}}
    length = {"data": ["seed.jsonl", data], "steps": 3 if quick else stage["steps"]}
    return ["stages=" + json.dumps([{**stage, **only, **length}])]


def right(texts: Iterable[str], samples: Iterable[pm.Sample]) -> float:
    """Share of texts that name colour, size and quadrant right, and nothing else."""
    pairs = zip(texts, samples, strict=True)
    return float(np.mean([list(facts(text)) == sample.meta["facts"] for text, sample in pairs]))


def drawn(seed: int) -> Sampling:
    """Captions from the nucleus, as in the paper: they show what a model believes, and not its best guess alone."""
    return Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=seed)


def bootstrap(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Write what passes the filter, with written captions and without; how well it judged, how right texts are."""
    judge = train(RECIPE, folder, "mender", seed, steps(quick))
    write = pm.load(folder / "runs" / "mender")
    read_weights(write.network, folder / "runs" / "mender" / "stages" / "01-write" / "weights.safetensors")
    # Nothing is thrown out at first, so that what will be is seen as well; its fit is in every line.
    capfilt(folder / "web.jsonl", folder / "all.jsonl", write, judge, sampling=drawn(seed), threshold=0.0)
    source = open_source(folder / "all.jsonl")
    texts = [source[i] for i in range(len(source))]
    is_right = np.array([list(facts(text.views["text"].text)) == text.meta["facts"] for text in texts])
    is_web = np.array([text.meta["caption"] == "original" for text in texts])
    is_kept = np.array([text.meta["fit"] >= EVEN for text in texts])
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, is_taken in (("filtered", is_kept & is_web), ("bootstrapped", is_kept)):
        taken = [line for line, take in zip(lines, is_taken, strict=True) if take]
        # A filter that knows nothing may throw out everything; a run of a few steps still has to go on.
        (folder / f"{name}.jsonl").write_text("".join(taken or lines), encoding="utf-8")
    return {
        "precision": _share(~is_right, is_web & ~is_kept),
        "recall": _share(~is_kept, is_web & ~is_right),
        "web": _share(is_right, is_web),
        "web_kept": _share(is_right, is_web & is_kept),
        "written": _share(is_right, ~is_web),
        "written_kept": _share(is_right, ~is_web & is_kept),
    }


def _share(is_so: NDArray[np.bool_], among: NDArray[np.bool_]) -> float:
    """Share of what is chosen for which something is so; 0 if nothing is chosen."""
    return float(is_so[among].mean()) if among.any() else 0.0


def run_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    val = make_data(folder, seed, quick)
    scores = bootstrap(folder, seed, quick)
    pictures = [sample.views["image"] for sample in val]
    for arm, data in (("noisy", "web.jsonl"), ("filtered", "filtered.jsonl"), ("bootstrapped", "bootstrapped.jsonl")):
        model = train(RECIPE, folder, arm, seed, alone(data, quick))
        scores[arm] = right(model.caption(pictures, sampling=drawn(seed)), val)
        scores[f"{arm}_likeliest"] = right(model.caption(pictures, max_new_tokens=24), val)
    scores["shuffled"] = right(model.caption(pictures[1:] + pictures[:1], max_new_tokens=24), val)
    scores["blind"] = right(model.caption([None], max_new_tokens=24) * len(val), val)
    return scores


EXAMPLE = Example(
    name="bootstrapping",
    title="Bootstrapping: 40 % of the captions belong to another picture (48 kinds of pictures)",
    rows={
        "web": "web captions that are right",
        "recall": "filter: of the wrong web captions, thrown out",
        "precision": "filter: of the web captions thrown out, wrong",
        "web_kept": "web captions that are right, after the filter",
        "written": "written captions that are right",
        "written_kept": "written captions that are right, after the filter",
        "noisy": "fresh captioner, from all web captions: right",
        "filtered": "fresh captioner, from the filtered ones: right",
        "bootstrapped": "fresh captioner, from the filtered and the written ones: right",
        "noisy_likeliest": "the same, its likeliest captions: from all web captions",
        "filtered_likeliest": "the same, its likeliest captions: from the filtered ones",
        "bootstrapped_likeliest": "the same, its likeliest captions: from the filtered and the written ones",
        "shuffled": "control: the last one, against the caption of another picture",
        "blind": "control: the last one, without a picture",
    },
    claims=(
        Claim(
            "the filter finds wrong captions (recall and precision at least 0.90)",
            lambda s: min(s["recall"], s["precision"]) >= 0.9,
        ),
        Claim("what it keeps is right more often (at least 0.90)", lambda s: s["web_kept"] >= 0.9),
        Claim("so are written captions than those of the web", lambda s: s["written_kept"] > s["web"]),
        Claim(
            "a captioner from filtered captions beats one from all (by 0.10)",
            lambda s: s["filtered"] >= s["noisy"] + 0.1,
        ),
        Claim("so does one from filtered and written captions", lambda s: s["bootstrapped"] >= s["noisy"] + 0.1),
        Claim(
            "without its picture a captioner knows nothing (at most 0.10)",
            lambda s: max(s["blind"], s["shuffled"]) <= 0.1,
        ),
    ),
    run_seed=run_seed,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
