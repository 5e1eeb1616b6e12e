"""Connectionist temporal classification: the loss against all alignments, the alphabet, and a model that learns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import build

from polymodal.core.batch import CtcOutput, Outputs
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Audio
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine
from polymodal.inference.transcription import transcribe_ctc
from polymodal.models.heads.ctc import CtcConfig, greedy_paths, join_units
from polymodal.objectives.ctc import Ctc, ctc_loss, needed_features

from .samples import batch_of

LETTERS = ("<pad>", "|", "a", "b", "c")


def by_enumeration(logits_NV: torch.Tensor, target: list[int], blank: int) -> float:
    """The loss as the negative logarithm of the summed chance of every path that reads as the target."""
    log_probs = logits_NV.double().log_softmax(dim=1)
    total = 0.0
    for path in itertools.product(range(logits_NV.shape[1]), repeat=len(logits_NV)):
        read = [index for index, _ in itertools.groupby(path) if index != blank]
        if read == target:
            total += math.exp(sum(float(log_probs[place, index]) for place, index in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("blank", [0, 2])
def test_the_loss_sums_over_every_alignment(blank: int) -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 4, 3])
    others = [index for index in range(4) if index != blank]
    targets = [[others[0], others[1]], [others[2], others[2]], [others[1]]]
    found = ctc_loss(logits, lengths, targets, blank)
    for row, target in enumerate(targets):
        expected = by_enumeration(logits[row, : lengths[row]], target, blank) / len(target)
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_read_and_gets_no_gradient() -> None:
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ctc_loss(logits, torch.tensor([6, 3]), [[1, 2], [3]], 0).sum().backward()
    assert logits.grad is not None and not logits.grad[1, 3:].any() and logits.grad[1, :3].any()


def test_transcripts_that_cannot_be_are_refused() -> None:
    for wrong in ([], [0]):
        with pytest.raises(ConfigError, match="ctc: found a transcript that is empty or holds the blank"):
            ctc_loss(torch.zeros(1, 3, 4), torch.tensor([3]), [wrong], 0)


def test_recordings_that_are_too_short_are_counted_and_those_without_a_transcript_left_out() -> None:
    assert needed_features([1, 2, 2]) == 4
    config = CtcConfig(stream="audio", vocabulary=LETTERS)
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = CtcOutput(logits, torch.tensor([4, 3, 4]), torch.tensor([0, 1, 2]), 0, config.encode)
    batch = batch_of(3, ["ab", "aab", None])
    report = Ctc()(Outputs(ctc=found), batch)
    assert report.count == 1 and float(report.parts["too_short"]) == 1
    expected = ctc_loss(logits[:1], torch.tensor([4]), [[2, 3]], 0)[0]
    torch.testing.assert_close(report.total, expected)
    nothing = Ctc()(Outputs(ctc=found), batch_of(3))
    assert nothing.count == 0 and not nothing.total.requires_grad
    with pytest.raises(ConfigError, match="objective ctc: the outputs have no ctc; add a ctc head"):
        Ctc()(Outputs(), batch)


def test_the_alphabet_reads_and_writes() -> None:
    head = CtcConfig(stream="audio", vocabulary=LETTERS)
    assert head.encode("ab c") == [2, 3, 1, 4] == head.encode("AB C")
    assert head.decode([0, 2, 2, 0, 2, 1, 1, 3, 0]) == "aa b"
    assert head.decode([1, 2, 1]) == "a"
    with pytest.raises(ConfigError, match="the character 'x' of 'ax' is not among the 5 tokens"):
        head.encode("ax")
    unknown = CtcConfig(stream="audio", vocabulary=(*LETTERS, "<unk>"), unknown="<unk>")
    assert unknown.encode("ax") == [2, 5]
    for change, message in (
        ({"vocabulary": ("a", "a")}, "expected distinct tokens"),
        ({"blank": 9}, "blank 9 is beyond the 5 tokens"),
        ({"unknown": "?"}, r"unknown: '\?' is not in the vocabulary"),
    ):
        with pytest.raises(ConfigError, match=message):
            CtcConfig.parse({"use": "ctc", "stream": "audio", "vocabulary": LETTERS, **change})


def test_the_clips_of_a_recording_follow_each_other() -> None:
    x = torch.arange(12.0).view(3, 4, 1)
    is_valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    joined, lengths = join_units(x, is_valid, [2, 1])
    assert lengths.tolist() == [6, 3]
    assert joined[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5] and joined[1, :3, 0].tolist() == [8, 9, 10]
    assert greedy_paths(torch.eye(3)[None], torch.tensor([2])) == [[0, 1]]


def spoken(text: str, seed: int) -> Audio:
    """A tone of 30 ms for each letter, in a little noise, with pauses."""
    rng = np.random.default_rng(seed)
    pieces = []
    for letter in text:
        place = np.arange(240)
        pieces += [np.sin(place * (0.2 + 0.5 * LETTERS.index(letter))), np.zeros(80)]
    wave = 0.5 * np.concatenate(pieces)
    return Audio((wave + rng.normal(0, 0.02, len(wave))).astype(np.float32), rate_hz=8_000)


def test_a_small_model_learns_to_transcribe() -> None:
    stream: dict[str, Any] = {
        "modality": "audio",
        "encoder": {"use": "audio_conv1d", "num_mels": 16, "width": 32, "strides": [2]},
        "reader": {"use": "audio", "rate_hz": 8_000, "num_mels": 16, "clip_s": 0.5},
    }
    head = {"use": "ctc", "stream": "audio", "vocabulary": LETTERS}
    toy = build({"streams": {"audio": stream}, "backbone": "none", "heads": {"ctc": head}})
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), size=2 + index % 3)) for index in range(48)]
    samples = [Sample(f"s{i}", views={"audio": spoken(text, i)}, label=text) for i, text in enumerate(texts)]
    batches = [toy.batch(samples[start : start + 16]) for start in (0, 16)]
    optimizer = torch.optim.AdamW(toy.network.parameters(), lr=5e-3)
    toy.network.train()
    for step in range(60):
        loss = Ctc()(toy.network(batches[step % 2], passes=("ctc",)), batches[step % 2]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    engine = Engine(toy.network, toy.processor)
    unseen, expected = [sample.views["audio"] for sample in samples[32:]], texts[32:]
    found = transcribe_ctc(engine, unseen, batch_size=5)
    hits = sum(mine == theirs for mine, theirs in zip(found, expected, strict=True))
    assert hits >= 14, f"{hits} of 16 right: {list(zip(found, expected, strict=True))}"
    assert transcribe_ctc(engine, unseen[3:4]) == found[3:4]


def test_a_model_without_the_head_cannot_transcribe() -> None:
    stream = {"modality": "audio", "encoder": {"use": "audio_conv1d", "num_mels": 8}}
    toy = build({"streams": {"audio": stream}, "backbone": "none", "heads": {}})
    with pytest.raises(ConfigError, match="the model has no head of the kind 'ctc'"):
        transcribe_ctc(Engine(toy.network, toy.processor), [spoken("a", 0)])
    with pytest.raises(ConfigError, match="head ctc: unknown stream 'speech'"):
        head = {"use": "ctc", "stream": "speech", "vocabulary": LETTERS}
        build({"streams": {"audio": stream}, "backbone": "none", "heads": {"ctc": head}})
