"""The encoder-decoder: what each side reads, packed, padded and cached; relative positions; learning to answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, asked, build, decoder_data, stream

from polymodal.core.errors import ConfigError
from polymodal.core.samples import Message, Sample, conversation
from polymodal.inference.engine import Engine
from polymodal.inference.sampling import Sampling
from polymodal.models.backbones.encoder_decoder import EncoderDecoderConfig
from polymodal.models.compose import ModelConfig, to_device
from polymodal.models.layers.positions import RelativePositions

GREEDY = Sampling(max_new_tokens=10)
STACK = {"width": 24, "depth": 2, "heads": 4, "norm": "rms", "bias": False}
RELATIVE = {**STACK, "relative_buckets": 8, "relative_distance": 16, "attention_scale": 1.0}
CASES: list[dict[str, Any]] = [
    {},
    {
        "positions": "learned",
        "embed_norm_eps": 1e-5,
        "shared": False,
        "encoder": STACK,
        "decoder": {**STACK, "depth": 3},
    },
    {"looks": True},
]
cases = pytest.mark.parametrize("case", CASES, ids=["relative", "learned", "looks"])


def make(case: dict[str, Any]) -> Toy:
    case = dict(case)
    data = decoder_data(tied=False)
    data["streams"] = {"image": stream("image"), "audio": stream("audio")}
    if case.pop("looks", False):
        data["streams"]["image"] = stream("image", enters="cross_attention", connector="linear")
    data["backbone"] = {"use": "encoder_decoder", "max_tokens": 200, "encoder": RELATIVE, "decoder": RELATIVE, **case}
    toy = build(data, seed=1)
    for name, parameter in toy.network.named_parameters():
        if parameter.dim() == 2 and "backbone" in name and "embed" not in name:
            parameter.data.mul_(3)
    return toy


def samples() -> list[Sample]:
    return [
        asked(0, "image", "audio"),
        asked(1, question="Is it red, or is there nothing to be seen?", answer="no"),
        asked(2, "image", "image"),
        asked(3, "audio", answer="beep beep and then nothing"),
    ]


def logits(toy: Toy, of: list[Sample], *, packed: bool) -> list[torch.Tensor]:
    with torch.inference_mode():
        outputs = toy.network(toy.batch(of, packed=packed))
    return [outputs.token_logits[outputs.token_samples == row] for row in range(len(of))]


@cases
def test_a_sample_gives_the_same_alone_padded_and_packed(case: dict[str, Any]) -> None:
    toy = make(case)
    alone = [logits(toy, [sample], packed=False)[0] for sample in samples()]
    for packed in (False, True):
        for one, other in zip(alone, logits(toy, samples(), packed=packed), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=3e-5 * float(one.abs().max()))


@cases
def test_answers_are_those_of_reading_everything_anew(case: dict[str, Any]) -> None:
    toy = make(case)
    engine = Engine(toy.network, toy.processor)
    prompts = [Sample(sample.id, sample.messages[:1]) for sample in samples()]
    together = [g.ids for g in engine.generate(prompts, GREEDY)]
    assert [list(engine.stream(prompt, GREEDY)) for prompt in prompts] == together
    for prompt, ids in zip(prompts, together, strict=True):
        plan = toy.processor.plan(prompt, prompt=True)
        for token in ids:
            batch = to_device(toy.processor.collate([toy.processor.load(plan)], packed=False), "cpu")
            with torch.inference_mode():
                assert int(toy.network.token_logits(toy.network.states(batch))[0, -1].argmax()) == token
            plan.ids.append(token)
            plan.is_supervised.append(False)
    assert len({tuple(ids) for ids in together}) > 2
    assert engine.logits(prompts[0]).shape == (1, toy.tokenizer.size)


def test_everything_before_the_last_answer_is_read_by_the_encoder() -> None:
    toy = make({})
    turns = (Message("user", conversation("a").messages[0].parts), *conversation("b", answer="c").messages[1:])
    sample = Sample("s", (*turns, *conversation("d", answer="e").messages))
    plan = toy.processor.plan(sample)
    text, controls = toy.tokenizer.encode, toy.tokenizer.control
    end, start = controls("</s>"), controls("<pad>")
    assert plan.ids[: plan.num_source] == [*text("a"), end, start, *text("c"), end, *text("d"), end]
    assert plan.ids[plan.num_source :] == [start, *text("e"), end]
    assert plan.is_supervised == [False] * (plan.num_source + 1) + [True, True]
    prompt = toy.processor.plan(Sample("s", sample.messages[:-1]), prompt=True)
    assert prompt.ids == plan.ids[: plan.num_source + 1] and prompt.num_source == plan.num_source


def test_relative_positions_are_bucketed_as_published() -> None:
    positions = RelativePositions(8, 16, 2)
    offsets = torch.tensor([0, -1, -2, -3, -4, -5, -6, -8, -12, -100, 3])
    assert positions.bucket(offsets, causal=True).tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 0]
    both = positions.bucket(torch.tensor([0, -1, 1, -3, 3, -100, 100]), causal=False)
    assert both.tolist() == [0, 1, 5, 2, 6, 3, 7]
    bias = positions(torch.tensor([[1]]), 3, causal=False)
    assert torch.equal(bias[0, :, 0, 2], positions.weight[5]) and bias.shape == (1, 2, 1, 3)


def test_it_learns_to_answer() -> None:
    toy = make({})
    for parameter in toy.network.parameters():
        if parameter.dim() == 2:
            parameter.data.div_(3)
    lessons = [
        conversation(f"{a} and {b}", answer=f"{b}, {a}", id=f"{a}{b}")
        for a, b in (("red", "cat"), ("blue", "dog"), ("dog", "red"))
    ]
    toy.learn(lessons, steps=50, rate=1e-2)
    engine = Engine(toy.network, toy.processor)
    answers = engine.generate([Sample(s.id, s.messages[:1]) for s in lessons], Sampling(max_new_tokens=24))
    assert [toy.tokenizer.decode(g.ids) for g in answers] == [s.messages[1].text for s in lessons]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="found widths 24 and 32"):
        EncoderDecoderConfig.parse({"encoder": RELATIVE, "decoder": {**RELATIVE, "width": 32}})
    with pytest.raises(ConfigError, match=r"positions: learned and encoder.relative_buckets: 8 contradict"):
        EncoderDecoderConfig.parse({"encoder": RELATIVE, "decoder": RELATIVE, "positions": "learned"})
    with pytest.raises(ConfigError, match=r"decoder.cross_width: follows from the model"):
        EncoderDecoderConfig.parse({"encoder": RELATIVE, "decoder": {**RELATIVE, "cross_width": 24}})
    toy = make({})
    batch = toy.batch([asked(0)])
    batch.source_lengths = None
    with pytest.raises(ConfigError, match="found a batch without source_lengths"):
        toy.network(batch)
    batch.source_lengths = (batch.ids.shape[1],)
    with pytest.raises(ConfigError, match=r"targets of \[0\] tokens, expected at least one of each"):
        toy.network(batch)
    assert ModelConfig.parse(toy.config.to_data()) == toy.config
