"""Next token, matching and classes: values by hand, parts, and messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from polymodal.core.batch import Outputs
from polymodal.core.errors import ConfigError, SampleError
from polymodal.objectives.classify import Classify
from polymodal.objectives.matching import Matching
from polymodal.objectives.next_token import NextToken

from .samples import batch_of

SAMPLES = torch.tensor([0, 0, 0, 1, 3])
MODALITIES = [("image",), (), ("audio",), ("audio", "image")]


def token_outputs() -> Outputs:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return Outputs(token_logits=logits, token_targets=torch.tensor([1, 4, 0, 10, 3]), token_samples=SAMPLES)


def losses(outputs: Outputs) -> torch.Tensor:
    return F.cross_entropy(outputs.token_logits, outputs.token_targets, reduction="none").detach()


def test_next_token_is_the_mean_over_tokens_with_a_part_per_modality():
    outputs = token_outputs()
    report = NextToken()(outputs, batch_of(4, modalities=MODALITIES))
    each = losses(outputs)
    torch.testing.assert_close(report.total, each.mean())
    assert report.count == 5
    assert set(report.parts) == {"image", "audio", "text"}
    torch.testing.assert_close(report.parts["image"], each[[0, 1, 2, 4]].mean())
    torch.testing.assert_close(report.parts["audio"], each[4])
    torch.testing.assert_close(report.parts["text"], each[3])
    assert not any(part.requires_grad for part in report.parts.values())


def test_next_token_by_sample():
    outputs = token_outputs()
    report = NextToken(average="sample")(outputs, batch_of(4, modalities=MODALITIES))
    each = losses(outputs)
    torch.testing.assert_close(report.total, (each[:3].mean() + each[3] + each[4]) / 3)
    assert report.count == 3, "the sample without targets does not count"
    torch.testing.assert_close(report.parts["image"], (each[:3].mean() + each[4]) / 2)


def test_next_token_by_answer_and_by_root():
    outputs = token_outputs()
    batch = batch_of(4, modalities=MODALITIES)
    # Sample 0 answers twice, with one token and with two; the others with one token, one of them not at all.
    batch.is_supervised = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    batch.ids = torch.zeros_like(batch.is_supervised, dtype=torch.int64)
    each = losses(outputs)
    by_answer = NextToken(average="answer")
    report = by_answer(outputs, batch)
    torch.testing.assert_close(report.total, (each[0] + each[1:3].mean() + each[3] + each[4]) / 4)
    assert report.count == by_answer.count(batch) == 4
    by_root = NextToken(average="root")
    report = by_root(outputs, batch)
    torch.testing.assert_close(report.total, (each[0] + each[1:3].sum() / 2**0.5 + each[3] + each[4]) / (3 + 2**0.5))
    assert report.count == by_root.count(batch) == pytest.approx(3 + 2**0.5)
    assert [NextToken(average=average).count(batch) for average in ("token", "sample")] == [5, 3]


@pytest.mark.parametrize("average", ["token", "sample", "answer", "root"])
def test_next_token_averages_alike_packed_and_padded(average):
    outputs = token_outputs()
    padded = batch_of(4, modalities=MODALITIES)
    padded.is_supervised = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    padded.ids = torch.zeros_like(padded.is_supervised, dtype=torch.int64)
    packed = batch_of(4, modalities=MODALITIES)
    packed.segment_lengths = (5, 2, 4, 2)
    rows = [row[:length] for row, length in zip(padded.is_supervised, packed.segment_lengths, strict=True)]
    packed.is_supervised = torch.cat(rows)[None]
    packed.ids = torch.zeros_like(packed.is_supervised, dtype=torch.int64)
    objective = NextToken(average=average)
    on_host = replace(padded, is_supervised=padded.is_supervised.numpy(), ids=padded.ids.numpy())
    assert objective.count(packed) == objective.count(padded) == objective.count(on_host)
    torch.testing.assert_close(objective(outputs, packed).total, objective(outputs, padded).total)


def test_next_token_weights():
    outputs = token_outputs()
    config = NextToken(weights={"image": 2.0, "text": 0.0})
    each = losses(outputs)
    expected = (2 * each[:3].sum() + 0 * each[3] + 1.5 * each[4]) / 5
    torch.testing.assert_close(config(outputs, batch_of(4, modalities=MODALITIES)).total, expected)


def test_next_token_without_targets_counts_nothing():
    outputs = Outputs(
        token_logits=torch.zeros(0, 11), token_targets=torch.zeros(0).long(), token_samples=torch.zeros(0).long()
    )
    report = NextToken()(outputs, batch_of(2))
    assert (report.count, float(report.total), report.total.requires_grad) == (0, 0.0, False)


def test_next_token_is_computed_in_float32():
    outputs = token_outputs()
    outputs.token_logits = outputs.token_logits.bfloat16()
    assert NextToken()(outputs, batch_of(4)).total.dtype == torch.float32


def test_next_token_messages():
    with pytest.raises(ConfigError, match="unknown modality 'imge'; did you mean 'image'"):
        NextToken.parse({"weights": {"imge": 1.0}}, "objectives.next_token")
    with pytest.raises(ConfigError, match=r"the weight of image is -1.0, expected 0 or more"):
        NextToken.parse({"weights": {"image": -1.0}})
    with pytest.raises(ConfigError, match="the outputs have no token_logits; add a next_token head to the model's"):
        NextToken()(Outputs(), batch_of(1))


def test_matching_reads_targets_from_labels_or_takes_them():
    outputs = Outputs(match_logits=torch.tensor([2.0, -1.0, 0.5]))
    report = Matching()(outputs, batch_of(3, ["match", None, "mismatch"]))
    expected = (-F.logsigmoid(torch.tensor(2.0)) - F.logsigmoid(torch.tensor(-0.5))) / 2
    torch.testing.assert_close(report.total, expected)
    assert (report.count, float(report.parts["accuracy"])) == (2, 0.5)
    passed = Matching()(outputs, batch_of(3), torch.tensor([True, False, False]))
    expected = -F.logsigmoid(torch.tensor([2.0, 1.0, -0.5])).mean()
    torch.testing.assert_close(passed.total, expected)
    assert Matching()(outputs, batch_of(3)).count == 0
    yes_no = Matching(positive="yes", negative="no")
    assert float(yes_no(outputs, batch_of(3, ["yes", "no", "yes"])).parts["accuracy"]) == 1.0


def test_matching_messages():
    outputs = Outputs(match_logits=torch.zeros(2))
    with pytest.raises(SampleError, match="sample s1: objective matching: unknown label 'mach'; did you mean 'match'"):
        Matching()(outputs, batch_of(2, ["match", "mach"]))
    with pytest.raises(ConfigError, match="positive and negative are both 'yes', expected two labels"):
        Matching.parse({"positive": "yes", "negative": "yes"})
    with pytest.raises(ConfigError, match="the outputs have no match_logits; add a matching head"):
        Matching()(Outputs(), batch_of(2))


def test_classify():
    outputs = Outputs(class_logits=torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    report = Classify(classes=["cat", "dog"])(outputs, batch_of(3, ["cat", None, "dog"]))
    expected = F.cross_entropy(outputs.class_logits[[0, 2]], torch.tensor([0, 1]))
    torch.testing.assert_close(report.total, expected)
    assert (report.count, float(report.parts["accuracy"])) == (2, 0.5)
    assert Classify(classes=["cat", "dog"])(outputs, batch_of(3)).count == 0


def test_classify_messages():
    outputs = Outputs(class_logits=torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="the class head has 3 outputs, expected 2, one per name in 'classes'"):
        Classify(classes=["cat", "dog"])(outputs, batch_of(2, ["cat", "dog"]))
    with pytest.raises(SampleError, match="sample s0: objective classify: unknown label 'cta'; did you mean 'cat'"):
        Classify(classes=["cat", "dog", "cow"])(outputs, batch_of(2, ["cta", "dog"]))
    with pytest.raises(ConfigError, match=r"expected at least two distinct class names, 3 given, repeated: \['a'\]"):
        Classify.parse({"classes": ["a", "b", "a"]})
