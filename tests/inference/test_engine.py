"""The engine: one answer whichever way it is made; nothing read or encoded twice; room and limits by name."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from toys import Toy, build, decoder_data, medium, merge_data, question, stream

from polymodal.core.batch import Plan, Span
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Image, Media, Text
from polymodal.core.samples import Message, Sample, conversation
from polymodal.inference.engine import Engine, Generation
from polymodal.inference.prefix import PrefixCache, identity, same_media, usable_start
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import to_device
from polymodal.models.layers.cache import KVCache

GREEDY = Sampling(max_new_tokens=12)


def make(**backbone: Any) -> tuple[Toy, Engine]:
    toy = build(decoder_data(tied=False, **backbone), seed=1)
    # Small random weights repeat one token; large ones make answers that depend on the whole prompt.
    for parameter in toy.network.decoder.transformer.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return toy, Engine(toy.network, toy.processor)


def questions() -> list[Sample]:
    return [
        question(0, "image", text="What is on the left of the large star?"),
        question(1, text="Is it red?"),
        question(2, "image", "image", "audio", text="Which?"),
        question(3, "sensor", text="?"),
        question(4, "video", "points", "image", text="Describe both, and say how they move."),
        question(5, "audio", text="Which sound is this?"),
    ]


def count_encodings(toy: Toy) -> Counter[str]:
    """Units that each encoder has seen."""
    counts: Counter[str] = Counter()
    for name, module in toy.network.streams.items():
        module.encoder.register_forward_hook(lambda _, inputs, __, name=name: counts.update({name: len(inputs[0])}))
    return counts


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_batch_gives_what_each_gives_alone_token_for_token(positions: str, batch_size: int) -> None:
    _, engine = make(positions=positions)
    together = engine.generate(questions(), GREEDY, batch_size)
    alone = [engine.generate([sample], GREEDY)[0] for sample in questions()]
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert [g.finish for g in together] == [g.finish for g in alone]
    assert len({tuple(g.ids) for g in alone}) > 3


def test_rows_that_stop_early_leave_the_others_as_they_are() -> None:
    toy, engine = make()
    plain = engine.generate(questions(), GREEDY)
    # The token that one answer has in its middle becomes the end token of the format.
    stop = plain[0].ids[4]
    end = toy.tokenizer.control("<|end|>")
    weight = toy.network.head("next_token").proj.weight.data
    weight[[stop, end]] = weight[[end, stop]]
    stopped = engine.generate(questions(), GREEDY)
    assert stopped[0].ids == plain[0].ids[: plain[0].ids.index(stop)] and stopped[0].finish == "stop"
    for before, after in zip(plain, stopped, strict=True):
        cut = before.ids.index(stop) if stop in before.ids else len(before.ids)
        assert after.ids[:cut] == before.ids[:cut]
        assert after.finish == ("stop" if stop in before.ids else "length")


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_every_drawn_token_is_the_best_of_an_uncached_pass(positions: str) -> None:
    toy, engine = make(positions=positions)
    for sample in questions()[:3]:
        (answer,) = engine.generate([sample], GREEDY)
        plan = toy.processor.plan(sample, prompt=True)
        start = plan.num_tokens
        plan.ids += answer.ids
        plan.is_supervised += [False] * len(answer.ids)
        batch = to_device(toy.processor.collate([toy.processor.load(plan)], packed=False), "cpu")
        with torch.no_grad():
            logits = toy.network.token_logits(toy.network.states(batch))[0]
        assert logits[start - 1 : -1].argmax(-1).tolist() == answer.ids


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_streaming_gives_what_generating_gives(positions: str) -> None:
    _, engine = make(positions=positions)
    for sample in questions():
        record = Generation()
        pieces = list(engine.stream(sample, GREEDY, record))
        (whole,) = engine.generate([sample], GREEDY)
        assert pieces == record.ids == whole.ids
        assert record.finish == whole.finish
        assert record.num_prompt_tokens == whole.num_prompt_tokens


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_second_question_reuses_the_prefix_and_encodes_nothing_again(positions: str) -> None:
    toy, engine = make(positions=positions)
    counts = count_encodings(toy)
    picture, sound = medium("image", 5), medium("audio", 6)
    first, second = (conversation(picture, sound, text) for text in ("What is on the left?", "What is on the right?"))
    list(engine.stream(first, GREEDY))
    assert counts == {"image": 1, "audio": 1}
    record = Generation()
    reused = list(engine.stream(second, GREEDY, record))
    assert counts == {"image": 1, "audio": 1}
    shared = toy.tokenizer.encode("What is on the right?")
    own = toy.tokenizer.encode("What is on the left?")
    same = next(i for i, (a, b) in enumerate(zip(shared, own, strict=False)) if a != b)
    media = sum(toy.processor.plan(second, prompt=True).ids.count(id) for id in [toy.tokenizer.media_id])
    assert record.num_reused_tokens == 1 + media + same
    assert reused == list(Engine(toy.network, toy.processor).stream(second, GREEDY))
    assert engine.prefixes.hits == 1


def test_equal_content_in_another_object_is_the_same_prefix_and_another_picture_is_not() -> None:
    toy, engine = make()
    counts = count_encodings(toy)
    picture = medium("image", 5)
    list(engine.stream(conversation(picture, "What?"), GREEDY))
    record = Generation()
    list(engine.stream(conversation(Image(picture.source.copy()), "What?"), GREEDY, record))
    assert counts["image"] == 1 and record.num_reused_tokens == record.num_prompt_tokens - 1
    record = Generation()
    answer = list(engine.stream(conversation(medium("image", 6), "What?"), GREEDY, record))
    assert counts["image"] == 2 and record.num_reused_tokens == 1
    assert answer == list(Engine(toy.network, toy.processor).stream(conversation(medium("image", 6), "What?"), GREEDY))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_turns_build_on_each_other_and_a_new_picture_in_turn_two_is_encoded_alone(positions: str) -> None:
    toy, engine = make(positions=positions)
    counts = count_encodings(toy)
    turns = [Message("user", (medium("image", 1), Text("What is it?")))]
    first = list(engine.stream(Sample("chat", tuple(turns)), GREEDY))
    turns.append(Message("assistant", (Text(toy.tokenizer.decode(first)),)))
    turns.append(Message("user", (medium("image", 2), Text("And this?"))))
    record = Generation()
    second = list(engine.stream(Sample("chat", tuple(turns)), GREEDY, record))
    assert counts["image"] == 2
    asked_before = toy.processor.plan(Sample("chat", tuple(turns[:1])), prompt=True).num_tokens
    assert record.num_reused_tokens >= asked_before
    fresh = Engine(toy.network, toy.processor, prefix_bytes=0)
    assert second == list(fresh.stream(Sample("chat", tuple(turns)), GREEDY))
    assert len(fresh.prefixes) == 0


def test_the_answer_is_kept_too_for_the_next_turn_and_so_is_half_a_one() -> None:
    toy, engine = make()
    sample = question(0, "image")
    answer = list(engine.stream(sample, GREEDY))
    plan = toy.processor.plan(sample, prompt=True)
    own = (*identity(plan), *answer, 7)
    plan.ids += [*answer, 7]
    reused, _ = engine.prefixes.find(plan, own)
    # The last token of an answer is drawn and never read.
    assert reused == len(own) - 2
    other = question(1, "audio")
    stream_ids = engine.stream(other, GREEDY)
    next(stream_ids)
    next(stream_ids)
    stream_ids.close()
    plan = toy.processor.plan(other, prompt=True)
    assert engine.prefixes.find(plan, identity(plan))[0] == plan.num_tokens - 1


def test_a_span_that_only_partly_agrees_is_read_again_whole() -> None:
    toy, engine = make()
    short, long = medium("audio", 3, length=1), medium("audio", 3, length=2)
    list(engine.stream(conversation(long, "?"), GREEDY))
    record = Generation()
    answer = list(engine.stream(conversation(short, "?"), GREEDY, record))
    assert record.num_reused_tokens == 1
    assert answer == list(Engine(toy.network, toy.processor).stream(conversation(short, "?"), GREEDY))


def test_the_prefix_cache_forgets_the_oldest_first() -> None:
    toy, engine = make()
    list(engine.stream(question(0, "image"), GREEDY))
    size = engine.prefixes.num_bytes
    small = Engine(toy.network, toy.processor, prefix_bytes=int(2.5 * size))
    for index in (0, 1, 0, 2):
        list(small.stream(question(index, "image"), GREEDY))
        assert small.prefixes.num_bytes <= 2.5 * size
    assert len(small.prefixes) == 2
    for index, is_kept in ((0, True), (1, False)):
        record = Generation()
        list(small.stream(question(index, "image"), GREEDY, record))
        assert record.num_reused_tokens == (record.num_prompt_tokens - 1 if is_kept else 1)


def test_logits_of_the_whole_sequence_are_those_of_the_steps() -> None:
    toy, engine = make()
    sample = questions()[2]
    logits = engine.logits(sample)
    assert logits.dtype == torch.float32
    assert logits.shape == (toy.processor.plan(sample, prompt=True).num_tokens, toy.tokenizer.size)
    assert int(logits[-1].argmax()) == engine.generate([sample], GREEDY)[0].ids[0]


def test_a_prompt_that_leaves_no_room_and_one_that_leaves_little() -> None:
    toy, _ = make()
    plan = toy.processor.plan(question(1), prompt=True)
    full = build(decoder_data(tied=False), max_tokens=plan.num_tokens)
    engine = Engine(full.network, full.processor)
    for ask in (lambda: engine.generate([question(1)], GREEDY), lambda: list(engine.stream(question(1), GREEDY))):
        with pytest.raises(SampleError, match=f"sample s1: the prompt takes all {plan.num_tokens} tokens"):
            ask()
    nearly_full = build(decoder_data(tied=False), max_tokens=plan.num_tokens + 3)
    engine_of_three = Engine(nearly_full.network, nearly_full.processor)
    (answer,) = engine_of_three.generate([question(1)], GREEDY)
    assert len(answer.ids) == len(list(engine_of_three.stream(question(1), GREEDY))) == 3
    assert answer.finish == "length"
    tiny = build(decoder_data(), max_tokens=5)
    with pytest.raises(SampleError, match=rf"the prompt has {plan.num_tokens} tokens, max_tokens is 5"):
        Engine(tiny.network, tiny.processor).generate([question(1)], GREEDY)


def test_learned_positions_reach_to_the_last_place_of_the_context() -> None:
    toy = build(decoder_data(positions="learned", max_tokens=24))
    engine = Engine(toy.network, toy.processor)
    (answer,) = engine.generate([question(1)], Sampling(max_new_tokens=500))
    assert answer.num_prompt_tokens + len(answer.ids) == 24
    assert list(engine.stream(question(1), Sampling(max_new_tokens=500))) == answer.ids


def test_a_seed_repeats_a_draw_and_no_seed_does_not() -> None:
    _, engine = make()
    hot = Sampling(max_new_tokens=12, temperature=1.5, seed=7)
    first = engine.generate(questions(), hot)
    assert [g.ids for g in engine.generate(questions(), hot)] == [g.ids for g in first]
    assert list(engine.stream(questions()[0], hot)) == list(engine.stream(questions()[0], hot))
    other = hot.model_copy(update={"seed": 8})
    assert [g.ids for g in engine.generate(questions(), other)] != [g.ids for g in first]
    free = hot.model_copy(update={"seed": None})
    assert len({tuple(engine.generate([questions()[0]], free)[0].ids) for _ in range(4)}) > 1


def test_no_samples_give_no_answers() -> None:
    assert make()[1].generate([], GREEDY) == []


def test_embedding_gives_unit_vectors_and_owners() -> None:
    data = {
        "streams": {name: stream(name, enters="none") for name in ("text", "image")},
        "backbone": "none",
        "heads": {"space": {"use": "projection", "dim": 8}},
    }
    toy = build(data)
    engine = Engine(toy.network, toy.processor)
    views = [Sample("a", views={"image": medium("image")}), Sample("b", views={"text": Text("a red cube")})]
    found = engine.embed(views)
    assert found["image"][1].tolist() == [0] and found["text"][1].tolist() == [1]
    assert all(abs(float((vectors**2).sum()) - 1) < 1e-5 for vectors, _ in found.values())
    for ask in (lambda: engine.generate([question(0)], GREEDY), lambda: list(engine.stream(question(0), GREEDY))):
        with pytest.raises(SampleError, match="this model has no decoder: it embeds and compares, it does not answer"):
            ask()


def test_class_logits_and_a_model_without_a_class_head() -> None:
    toy = build(merge_data())
    engine = Engine(toy.network, toy.processor)
    views = [Sample("a", views={"image": medium("image")}), Sample("b", views={"text": Text("a red cube")})]
    assert engine.class_logits(views).shape == (2, 3)
    with pytest.raises(ConfigError, match="no head of the kind 'class'"):
        make()[1].class_logits(views)


def test_media_are_read_from_headers_before_anything_is_decoded() -> None:
    _, engine = make()
    with pytest.raises(SampleError, match=r"sample request: .*nowhere\.png"):
        engine.generate([conversation(Image("nowhere.png"), "What?")], GREEDY)
    assert issubclass(Image, Media)


def test_the_tree_finds_what_a_search_of_all_entries_finds() -> None:
    rng = random.Random(0)
    cache = PrefixCache(40 * KVCache(1, 1, 1, 4, 1).num_bytes)
    held: OrderedDict[tuple[int, ...], int] = OrderedDict()
    for turn in range(600):
        own = tuple(rng.randrange(2) for _ in range(rng.randint(2, 12)))
        start = rng.randint(0, len(own) - 1)
        span = Span("image", 0, start, rng.randint(1, len(own) - start))
        plan = Plan("p", list(own), [False] * len(own), [span], {})
        best, expected = 0, None
        for other in reversed(held):
            same = next(
                (i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other))
            )
            if usable_start(plan, same) > best:
                best, expected = usable_start(plan, same), other
        reused, found = cache.find(plan, own)
        assert reused == best
        if expected is not None:
            assert found is not None and found.turn == held[expected]
            held.move_to_end(expected)
        made = KVCache(1, 1, 1, 16, 1)
        made.begin(len(own))
        made.end(len(own), None)
        cache.put(own, made)
        cache._entries[own].turn = turn
        held.pop(own, None)
        held[own] = turn
        size = sum(entry.num_bytes for entry in cache._entries.values())
        assert cache.num_bytes == size <= cache.max_bytes
        while len(held) > len(cache):
            held.popitem(last=False)
        assert list(held) == list(cache._entries)
    places = [cache._root]
    for place in places:
        places += place.followed.values()
    assert len(places) - 1 == len({own[: end + 1] for own in held for end in range(len(own))}), "nothing is left behind"


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_prompts_about_the_same_media_read_them_once_in_a_batch(positions: str) -> None:
    toy, engine = make(positions=positions)
    several = [
        question(0, "image", text="What is on the left of the large star?"),
        question(2, "image", "audio", text="Which?"),
        question(0, "image", text="Is it red?"),
        question(2, "image", "audio", text="Describe both, and say how they move."),
        question(0, "image", text="?"),
        question(1, "image", text="?"),
    ]
    alone = [engine.generate([sample], GREEDY)[0] for sample in several]
    counts = count_encodings(toy)
    read: list[int] = []
    toy.network.decoder.transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    together = engine.generate(several, GREEDY)
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert [each.num_prompt_tokens for each in together] == [each.num_prompt_tokens for each in alone]
    assert counts == {"image": 3, "audio": 1}
    reused = [each.num_reused_tokens for each in together]
    assert sorted(place for place, num in enumerate(reused) if num) != [] and sum(map(bool, reused)) == 3
    # Three beginnings and six ends instead of six whole prompts.
    assert sum(read[:2]) < 6 * max(each.num_prompt_tokens for each in together)


def test_prompts_with_and_without_media_stand_in_one_batch() -> None:
    _, engine = make()
    several = [*questions(), question(0, "image", text="Another one?"), question(9, text="None at all?")]
    expected = [engine.generate([sample], GREEDY)[0].ids for sample in several]
    assert [each.ids for each in engine.generate(several, GREEDY)] == expected


def test_who_begins_alike() -> None:
    _, engine = make()
    plans = [
        engine.processor.plan(sample, prompt=True)
        for sample in (
            question(0, "image", text="a"),
            question(0, text="a"),
            question(0, "image", text="b"),
            question(1, "image", text="a"),
        )
    ]
    assert same_media(plans) == [0, 1, 0, 3]
