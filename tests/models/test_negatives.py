"""Mismatched samples: which samples are one thing, and that none of them is drawn as the other's mismatch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import Toy, build, joint_data, medium, merge_data

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.models.compose.negatives import matching_groups, mismatched
from polymodal.objectives.matching import Matching
from polymodal.training.stage import StageConfig

TEXTS = ("a red cube", "a red cube", "it falls", "blue", "a beep")
HEADS = {"match": {"use": "matching"}, "space": {"use": "projection", "dim": 8, "streams": ["text", "image"]}}
MODELS = {"encoder": joint_data(HEADS), "merge": merge_data("sum", HEADS)}


def pair(image: int, text: int | None = None, label: str | None = None) -> Sample:
    views = {"image": medium("image", image), "text": Text(TEXTS[image if text is None else text])}
    return Sample(f"{image}-{text}", views=views, label=label)


def same(toy: Toy, samples: list[Sample], **changed: Any) -> list[list[int]]:
    batch = toy.batch(samples)
    streams = {n: replace(s, **changed) if n == "text" else s for n, s in batch.streams.items()}
    groups_S = matching_groups(replace(batch, streams=streams), ["text"])
    return [[row for row in range(len(samples)) if groups_S[row] == group] for group in groups_S]


def test_samples_are_one_thing_by_their_labels_and_without_labels_by_their_texts() -> None:
    toy = build(joint_data(HEADS))
    assert same(toy, [pair(i) for i in range(4)]) == [[0, 1], [0, 1], [2], [3]]
    labelled = [pair(0, label="x"), pair(1, label="y"), pair(2, label="x"), pair(0), pair(1)]
    assert same(toy, labelled) == [[0, 2], [1], [0, 2], [3, 4], [3, 4]]
    wordless = [Sample(str(i), views={"image": medium("image", i)}) for i in range(2)]
    assert same(toy, wordless) == [[0], [1]]
    assert same(toy, [pair(i) for i in range(3)], values=None, keys=["k", "k", "l"]) == [[0, 1], [0, 1], [2]]


def test_a_mismatch_comes_from_another_group_and_from_each_of_them_in_time() -> None:
    groups_S = torch.tensor([4, 4, 7, 7, 9])
    tokens = {name: torch.arange(5.0)[:, None, None] + shift for name, shift in (("image", 0), ("text", 10))}
    is_valid = {name: torch.ones(5, 1, dtype=torch.bool) for name in tokens}
    is_valid["text"][4] = False
    drawn = set()
    torch.manual_seed(0)
    for _ in range(100):
        mixed, _, samples = mismatched(tokens, is_valid, groups_S)
        assert samples.tolist() == [0, 1, 2, 3], "the last has one stream alone"
        images, texts = (mixed[name].flatten().long() % 10 for name in ("image", "text"))
        assert ((images == samples) != (texts == samples)).all()
        drawn |= set(zip(images.tolist(), texts.tolist(), strict=True))
    assert drawn == {(i, t) for i in range(5) for t in range(4) if groups_S[i] != groups_S[t]}
    torch.manual_seed(3)
    first = mismatched(tokens, is_valid, groups_S)[0]["image"]
    torch.manual_seed(3)
    assert torch.equal(first, mismatched(tokens, is_valid, groups_S)[0]["image"])


@torch.no_grad()
@pytest.mark.parametrize("needed", ["match", "match_hard"])
@pytest.mark.parametrize("labels", [["x", "x", "y", "z"], [None] * 4])
def test_a_model_never_mixes_two_samples_of_one_thing(needed: str, labels: list[str | None]) -> None:
    toy = build(MODELS["encoder"])
    found = pairs_in(toy, [pair(i, label=label) for i, label in enumerate(labels)], needed)
    assert found == {(i, t) for i in range(4) for t in range(4) if i != t and {i, t} != {0, 1}}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_labels_are_looked_at_unless_they_are_to_be_negatives(name: str) -> None:
    toy, samples = build(MODELS[name]), [pair(i + 1, label=label) for i, label in enumerate("xxy")]
    assert pairs_in(toy, samples, "match") == {(0, 2), (1, 2), (2, 0), (2, 1)}
    assert (0, 1) in pairs_in(toy, samples, "match_any")


def pairs_in(toy: Toy, samples: list[Sample], needed: str) -> set[tuple[int, int]]:
    """Of which two samples the mixed ones took picture and text, over thirty draws, read off their logits."""
    crossed = [
        Sample(f"{i}-{t}", views={"image": a.views["image"], "text": b.views["text"]})
        for i, a in enumerate(samples)
        for t, b in enumerate(samples)
    ]
    logits_K = toy.network(toy.batch(crossed), ("merge",)).match_logits
    found = set()
    torch.manual_seed(0)
    for _ in range(30):
        outputs = toy.network(toy.batch(samples), (needed,))
        for logit, sample in zip(outputs.mismatch_logits, outputs.mismatch_samples.tolist(), strict=True):
            distances_K = (logits_K - logit).abs()
            places = [divmod(place, len(samples)) for place in (distances_K < 1e-5).nonzero().flatten().tolist()]
            # Samples of equal texts give one logit: all that it could be of are counted.
            fitting = [place for place in places if sample in place and place[0] != place[1]]
            assert fitting, f"found {places}, expected a pair with {sample} and another"
            found |= set(fitting)
    return found


@torch.no_grad()
def test_a_batch_of_one_thing_gives_no_loss() -> None:
    for data in MODELS.values():
        toy = build(data)
        batch = toy.batch([pair(0), pair(1)])
        objective = Matching(negatives="batch")
        report = objective(toy.network(batch, (objective.needs,)), batch)
        assert report.count == 0 and float(report.total) == 0.0


def test_the_option_is_for_drawn_negatives() -> None:
    assert Matching(negatives="batch").needs == "match"
    assert Matching(negatives="batch", same_label="negative").needs == "match_any"
    for negatives in ("hard", "labels"):
        with pytest.raises(ConfigError, match=f"'negative' with negatives: {negatives}, expected 'skip', or negatives"):
            Matching.parse({"negatives": negatives, "same_label": "negative"})
    both = {"a": {"use": "matching", "negatives": "batch"}, "b": {"use": "matching", "negatives": "hard"}}
    stage = {"name": "s", "train": ["heads"], "data": ["x.jsonl"], "objectives": both, "steps": 1}
    with pytest.raises(ConfigError, match="stage 's': found several kinds of negatives of matching, expected one kind"):
        StageConfig.parse({**stage, "batch": {"samples": 2}})
