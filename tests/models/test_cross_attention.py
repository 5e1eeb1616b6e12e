"""Streams that the decoder looks at: who sees what, packed, padded and cached alike; learning from them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, asked, build, decoder_data, medium, stream

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Image, Media
from polymodal.core.samples import Message, Sample, conversation
from polymodal.inference.engine import Engine, Generation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import ModelConfig
from polymodal.models.layers.memory import Memory

GREEDY = Sampling(max_new_tokens=12)
CASES: list[dict[str, Any]] = [
    {},
    {"gate": "tanh", "every": 2},
    {"gate": "tanh_channel", "mask": "latest_media", "qk_norm": True},
    {"mask": "latest_media"},
    {"placeholder": True},
]
cases = pytest.mark.parametrize("entry", CASES, ids=str)


def data(entry: dict[str, Any], *, connector: Any = "linear", **backbone: Any) -> dict[str, Any]:
    """Images and sounds that the decoder looks at, and sensors in its sequence."""
    enters = {"use": "cross_attention", **entry}
    whole = decoder_data(tied=False, **backbone)
    changes = {"enters": enters, "connector": connector}
    whole["streams"] = {
        "image": stream("image", **changes),
        "audio": stream("audio", **changes),
        "sensor": stream("sensor"),
    }
    return whole


def make(entry: dict[str, Any], **options: Any) -> Toy:
    """A toy whose gates stand open, and whose weights are large enough for answers that depend on the prompt."""
    toy = build(data(entry, **options), seed=1)
    for name, parameter in toy.network.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
        elif parameter.dim() == 2 and name.startswith("backbone.transformer"):
            parameter.data.mul_(6)
    return toy


def samples() -> list[Sample]:
    return [
        asked(0, "image", "audio"),
        asked(1, question="Is it red, or is there nothing to be seen?"),
        asked(2, "image", "image", "sensor"),
        asked(3, "audio", answer="beep beep"),
    ]


def logits(toy: Toy, batch_of: list[Sample], *, packed: bool) -> list[torch.Tensor]:
    outputs = toy.network(toy.batch(batch_of, packed=packed))
    return [outputs.token_logits[outputs.token_samples == row] for row in range(len(batch_of))]


@cases
def test_a_sample_gives_the_same_alone_padded_and_packed(entry: dict[str, Any]) -> None:
    toy = make(entry)
    alone = [logits(toy, [sample], packed=False)[0] for sample in samples()]
    for together in (logits(toy, samples(), packed=False), logits(toy, samples(), packed=True)):
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@cases
def test_the_answer_depends_on_the_medium_and_on_nobody_elses(entry: dict[str, Any]) -> None:
    toy = make(entry)
    plain = logits(toy, samples(), packed=True)
    changed = samples()
    changed[0] = conversation(medium("image", 99), medium("audio", 0), "What is it?", answer="A red cube.", id="s0")
    other = logits(toy, changed, packed=True)
    assert float((other[0] - plain[0]).detach().abs().max()) > 1e-3
    for row in (1, 2, 3):
        assert torch.equal(other[row], plain[row])


@cases
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_batch_answers_token_for_token_as_each_alone(entry: dict[str, Any], batch_size: int) -> None:
    toy = make(entry)
    engine = Engine(toy.network, toy.processor)
    prompts = [Sample(sample.id, sample.messages[:1]) for sample in samples()]
    together = [g.ids for g in engine.generate(prompts, GREEDY, batch_size)]
    uncached = [_without_cache(toy, prompt, len(ids)) for prompt, ids in zip(prompts, together, strict=True)]
    assert together == uncached
    assert len({tuple(ids) for ids in together}) > 2


@cases
def test_a_medium_asked_about_again_is_neither_encoded_nor_read_again(entry: dict[str, Any]) -> None:
    toy = make(entry)
    engine, fresh = Engine(toy.network, toy.processor), Engine(toy.network, toy.processor, prefix_bytes=0)
    seen: list[int] = []
    toy.network.streams["image"].encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    photo, record = medium("image", 5), Generation()
    first = [Message("user", conversation(photo, "What?").messages[0].parts)]
    answer = list(engine.stream(Sample("a", tuple(first)), GREEDY, record))
    assert record.num_reused_tokens == 0 and seen == [1]
    assert answer == list(fresh.stream(Sample("a", tuple(first)), GREEDY))
    seen.clear()
    again = conversation(photo, "What? And where is it?")
    assert list(engine.stream(again, GREEDY, record)) == list(fresh.stream(again, GREEDY))
    assert record.num_reused_tokens > 1 and seen == [1], "only the engine without a prefix cache encodes it"
    seen.clear()
    other = conversation(medium("image", 6), "What? And where is it?")
    assert list(engine.stream(other, GREEDY, record)) == list(fresh.stream(other, GREEDY))
    assert record.num_reused_tokens == 0 and seen == [1, 1]
    more = conversation(photo, "What?", medium("image", 7), "And this?")
    assert list(engine.stream(more, GREEDY, record)) == list(fresh.stream(more, GREEDY))


def _without_cache(toy: Toy, prompt: Sample, count: int) -> list[int]:
    """Greedy tokens, the whole sequence read anew for each."""
    plan = toy.processor.plan(prompt, prompt=True)
    ids: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            batch = _batch(toy, plan)
            ids.append(int(toy.network.token_logits(toy.network.states(batch))[0, -1].argmax()))
            plan.ids.append(ids[-1])
            plan.is_supervised.append(False)
    return ids


def _batch(toy: Toy, plan: Any) -> Any:
    from polymodal.models.compose import to_device

    return to_device(toy.processor.collate([toy.processor.load(plan)], packed=False), "cpu")


def test_without_a_placeholder_the_sequence_does_not_grow_with_one_it_grows_by_one_token_an_item() -> None:
    text = make({}).processor.plan(asked(0)).num_tokens
    assert make({}).processor.plan(asked(0, "image", "audio")).num_tokens == text
    plan = make({"placeholder": True}).processor.plan(asked(0, "image", "audio"))
    assert plan.num_tokens == text + 2 and [span.length for span in plan.spans] == [1, 1]


def test_a_token_sees_the_latest_item_at_or_before_its_place() -> None:
    toy = make({"mask": "latest_media"})
    both = conversation("before", medium("image", 0), "x", medium("image", 1), "yy", answer="a", id="two")
    for packed in (False, True):
        batch = toy.batch([asked(1), both], packed=packed)
        memory = toy.network.memory(batch)
        assert memory is not None and memory.may_attend_BTM is not None and memory.next_BM is not None
        tokens = 4
        offset = batch.segment_lengths[0] if batch.segment_lengths else 0
        seen = memory.may_attend_BTM[0 if packed else 1, offset:]
        first, second = (int(place) % (10**9 if packed else batch.ids.shape[1]) - offset for place in (
            batch.streams["image"].token_index
        ))  # fmt: skip
        assert not seen[:first].any()
        assert torch.equal(seen[first], torch.tensor([True] * tokens + [False] * tokens))
        assert torch.equal(seen[second - 1], seen[first])
        assert torch.equal(seen[second], torch.tensor([False] * tokens + [True] * tokens))
        assert torch.equal(memory.next_BM[1], seen[second]) and not memory.next_BM[0].any()
        assert not memory.may_attend_BTM[0, : batch.segment_lengths[0] if packed else None].any()


def test_gates_start_closed_so_that_a_finished_decoder_answers_as_before() -> None:
    toy = build(data({"gate": "tanh"}), seed=1)
    with_image = logits(toy, [asked(0, "image")], packed=False)[0]
    without = logits(toy, [asked(0)], packed=False)[0]
    assert torch.equal(with_image, without)


def test_features_are_seen_in_their_own_width_where_there_is_no_connector() -> None:
    toy = make({}, connector=None)
    cross = toy.network.decoder.transformer.blocks[0].cross_attention
    assert cross is not None and cross.k_proj.in_features == 16 and cross.q_proj.in_features == 24
    assert toy.config.streams["image"].connector is None
    alone = logits(toy, [samples()[0]], packed=False)[0]
    torch.testing.assert_close(logits(toy, samples(), packed=True)[0], alone, rtol=1e-4, atol=1e-4)


def test_a_memory_of_one_item_a_sample_is_not_copied() -> None:
    toy = make({}, connector=None)
    batch = toy.batch([asked(0, "image"), asked(1, "image")])
    features = toy.network.encode("image", batch.streams["image"])
    memory = toy.network.memory(batch, {"image": features})
    assert memory is not None and memory.x_BMC is features.x_UND and memory.is_valid_BM is None


def test_every_names_the_blocks_that_look() -> None:
    toy = make({"every": 2})
    assert [block.cross_attention is not None for block in toy.network.decoder.transformer.blocks] == [True, False]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="latest_media needs to know where items stand"):
        ModelConfig.parse(data({"mask": "latest_media", "placeholder": False}))
    whole = data({})
    whole["streams"]["audio"]["enters"] = {"use": "cross_attention", "every": 2}
    with pytest.raises(ConfigError, match="must agree in every, gate, qk_norm and width"):
        ModelConfig.parse(whole)
    merged = {
        "streams": {"image": stream("image", enters="cross_attention")},
        "backbone": {"use": "merge", "width": 16},
        "heads": {"class": {"use": "class", "classes": ["a", "b"]}},
    }
    with pytest.raises(ConfigError, match="enters by 'cross_attention', which needs the backbone"):
        ModelConfig.parse(merged)


def test_a_model_learns_what_only_the_looked_at_medium_tells() -> None:
    whole = data({"gate": "tanh"})
    whole["streams"] = {"image": whole["streams"]["image"]}
    toy = build(whole, seed=0)
    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
    rows = [(name, _plain(colour, seed)) for seed in range(2) for name, colour in colours.items()]
    lessons = [conversation(photo, "Which?", answer=name, id=str(i)) for i, (name, photo) in enumerate(rows)]
    toy.learn(lessons, steps=40, rate=1.5e-2)
    engine = Engine(toy.network, toy.processor)
    fresh = [(name, conversation(_plain(colour, 77), "Which?")) for name, colour in colours.items()]
    answers = engine.generate([prompt for _, prompt in fresh], GREEDY)
    assert [toy.tokenizer.decode(g.ids) for g in answers] == [name for name, _ in fresh]
    # Without a picture there is nothing to tell the colours apart by.
    blind = toy.tokenizer.decode(engine.generate([conversation("Which?")], GREEDY)[0].ids)
    assert sum(blind == name for name, _ in fresh) <= 1


def _plain(colour: tuple[int, int, int], seed: int) -> Media:
    import numpy as np

    noise = np.random.default_rng(seed).normal(0, 20, (16, 16, 3))
    return Image((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def test_a_memory_that_nobody_sees_gives_zeros() -> None:
    memory = Memory(torch.randn(2, 3, 4), torch.tensor([[True, False, False], [False] * 3]))
    mask, sees_any = memory.mask
    assert mask is not None and sees_any is not None
    assert sees_any.tolist() == [[True], [False]] and mask.tolist() == [[[True, False, False]], [[True] * 3]]
