"""Objectives that read masked_token heads, and matching with hard negatives."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import build, joint_data, medium

from polymodal.core.batch import Outputs, TokenOutput
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Text
from polymodal.core.passes import TokenPass
from polymodal.core.samples import Sample
from polymodal.objectives.masked import Caption, MaskedImage, MaskedText
from polymodal.objectives.matching import Matching
from polymodal.objectives.table import OBJECTIVES, WeightedObjective
from polymodal.training.twin import Twin

HEADS = {
    "words": {"use": "masked_token"},
    "pixels": {"use": "masked_token", "stream": "image", "predicts": "pixels"},
    "space": {"use": "projection", "dim": 8, "through": ["text", "image"]},
    "match": {"use": "matching"},
}


def batch_of() -> Any:
    toy = build(joint_data(HEADS))
    views = [{"image": medium("image", i), "text": Text(text)} for i, text in enumerate(["a cube", "it falls", "blue"])]
    return toy, toy.batch([Sample(str(i), views=each) for i, each in enumerate(views)])


def test_the_loss_is_the_mean_over_hidden_places() -> None:
    logits, targets = torch.randn(5, 9), torch.tensor([0, 3, 3, 8, 1])
    objective = MaskedText()
    outputs = Outputs(tokens={objective.needs: TokenOutput(logits, targets, torch.zeros(5, dtype=torch.int64))})
    report = objective(outputs, batch_of()[1])
    torch.testing.assert_close(report.total, F.cross_entropy(logits, targets))
    assert report.count == 5 and float(report.parts["accuracy"]) == float((logits.argmax(1) == targets).float().mean())


def test_pixels_are_compared_by_squares_and_codes_by_chance() -> None:
    predictions, pixels = torch.randn(4, 6), torch.randn(4, 6)
    objective = MaskedImage()
    outputs = Outputs(tokens={objective.needs: TokenOutput(predictions, pixels, torch.zeros(4))})
    torch.testing.assert_close(objective(outputs, batch_of()[1]).total, ((predictions - pixels) ** 2).mean())


def test_objectives_name_their_pass() -> None:
    assert MaskedText().needs == TokenPass("masked", "", (("text", 0.15),))
    joint = {"text": 0.15, "image": 0.4}
    one, other = MaskedText(head="a", mask=joint).needs, MaskedImage(head="b", mask=joint).needs
    assert one != other and one.run == other.run, "one run serves both heads"
    assert Caption(head="words").needs == TokenPass("caption", "words")
    assert Matching(negatives="hard").needs == "match_hard"


def test_counts_are_known_before_the_pass() -> None:
    _, batch = batch_of()
    words = int(batch.streams["text"].lengths.sum())
    assert MaskedText().count(batch) == words and Caption().count(batch) == words - 3
    assert MaskedImage().count(batch) == 3 * 16
    del batch.streams["text"]
    assert MaskedText().count(batch) == 0 and Caption().count(batch) == 0


@pytest.mark.parametrize("name", ["masked_text", "masked_image", "caption"])
def test_gradients_reach_words_and_patches(name: str) -> None:
    toy, batch = batch_of()
    objective = OBJECTIVES.parse({"use": name, "head": "pixels" if name == "masked_image" else "words"})
    objective(toy.network(batch, (objective.needs,)), batch).total.backward()
    for stream in ("text", "image"):
        gradients = [p.grad for p in toy.network.streams[stream].encoder.parameters()]
        assert any(grad is not None and bool(grad.any()) for grad in gradients)


def test_a_batch_without_the_stream_says_nothing() -> None:
    toy, _ = batch_of()
    batch = toy.batch([Sample("x", views={"image": medium("image", 0)})])
    objective = MaskedText(head="words")
    report = objective(toy.network(batch, (objective.needs,)), batch)
    assert report.count == 0 and not report.total.requires_grad


@pytest.mark.parametrize("mask", [{}, {"text": 0.0}, {"text": 1.0}])
def test_shares_outside_the_open_interval_are_refused(mask: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected one above 0 and below 1 for each hidden stream"):
        MaskedText.parse({"mask": mask})


def test_without_its_head_the_objective_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="objective masked_text: the outputs have no tokens; add a masked_token head"):
        MaskedText()(Outputs(), batch_of()[1])


def test_hard_negatives_count_each_true_pair_once() -> None:
    toy, batch = batch_of()
    torch.manual_seed(0)
    outputs = toy.network(batch, ("match_hard",))
    report = Matching(negatives="hard")(outputs, batch)
    logits = torch.cat([outputs.match_logits, outputs.mismatch_logits])
    targets = torch.tensor([1.0] * 3 + [0.0] * 6)
    torch.testing.assert_close(report.total, F.binary_cross_entropy_with_logits(logits, targets))
    assert report.count == 9


def test_soft_targets_are_the_twins_word_for_the_same_hidden_places() -> None:
    toy, batch = batch_of()
    objective = MaskedText(head="words", mask={"text": 0.4, "image": 0.4}, alpha=0.4)
    entry = WeightedObjective("masked_text", 1.0, objective)
    twin = Twin.of(toy.network, [entry])
    assert twin is not None and Twin.of(toy.network, [WeightedObjective("m", 1.0, MaskedText())]) is None
    for ours, _ in twin._followed:
        ours.mul_(1.5)
    torch.manual_seed(3)
    outputs = toy.network(batch, [objective.needs])
    twin.teach(batch, outputs, contextlib.nullcontext)
    mine, theirs = outputs.tokens[objective.needs], outputs.teacher.tokens[objective.needs]
    assert torch.equal(mine.targets, theirs.targets) and torch.equal(mine.samples, theirs.samples)
    for name, (values, is_masked) in mine.shown.items():
        assert torch.equal(values, theirs.shown[name][0]) and torch.equal(is_masked, theirs.shown[name][1])
    p, q = mine.predictions.softmax(1), theirs.predictions.softmax(1)
    hard = -p[torch.arange(len(p)), mine.targets].log().mean()
    soft = (q * (q.log() - p.log())).sum(1).mean()
    report = objective(outputs, batch)
    torch.testing.assert_close(report.total, 0.6 * hard + 0.4 * soft)
    torch.testing.assert_close(report.parts["twin"], soft)
    report.total.backward()
    assert all(p.grad is None for p in twin.network.parameters())
    # Told by itself what it says, the model hears only what stood there: the same places give the same predictions.
    again = toy.network(batch, [objective.needs], {objective.needs.run: mine.shown})
    torch.testing.assert_close(again.tokens[objective.needs].predictions, mine.predictions)
    alone = Outputs(tokens=outputs.tokens)
    torch.testing.assert_close(objective(alone, batch).total, hard)
