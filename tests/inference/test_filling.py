"""Hidden words: the right tokens are hidden, the head that is asked answers, and no sample depends on another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, build, encoder_data, joint_data, medium

from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.limits import Limits
from polymodal.core.parts import Part, Text
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine
from polymodal.inference.filling import fill
from polymodal.modalities.text.reader import TextReader, TextReaderConfig
from polymodal.models.compose.joint import JointRun
from polymodal.models.compose.masking import MASK_TOKENS

WORDS = {"words": {"use": "masked_token"}}
TEXT = "A large blue star is above a small green ring."


def sample(index: int, text: str = TEXT, *, image: bool = True) -> Sample:
    views: dict[str, Part] = {"text": Text(text)}
    return Sample(f"s{index}", views={**views, "image": medium("image", index)} if image else views)


def span(word: str, text: str = TEXT) -> tuple[int, int]:
    return text.index(word), text.index(word) + len(word)


def engine_of(toy: Toy) -> Engine:
    return Engine(toy.network, toy.processor)


@pytest.mark.parametrize("data", [joint_data(), encoder_data(heads=WORDS, watched=("image",))])
def test_the_answer_is_the_likeliest_token_of_a_run_with_exactly_the_word_hidden(data: dict[str, Any]) -> None:
    toy = build(data, seed=1)
    batch = toy.batch([sample(0)])
    ids, mask = batch.streams["text"].values.clone(), toy.tokenizer.control(MASK_TOKENS[0])
    # The toy's words are several tokens each: those before the word, and those through it.
    first, last = (len(toy.tokenizer.encode(TEXT[: TEXT.index(end)])) for end in (" small", " green"))
    assert last - first > 1
    ids[0, first:last] = mask
    batch.streams["text"].values = ids
    features = {name: toy.network.encode(name, stream) for name, stream in batch.streams.items()}
    run = JointRun(toy.network, batch, features)
    with torch.inference_mode():
        states = run.states(*run.lay_out(features)).x["text"][0, first:last]
        expected = toy.tokenizer.decode(toy.network.heads["words"](states).argmax(1).tolist()).strip()
    assert fill(engine_of(toy), [sample(0)], [span("small")]) == [expected]


def test_texts_and_pictures_of_others_change_nothing() -> None:
    toy = build(joint_data(), seed=2)
    samples = [sample(0), sample(1, "blue", image=False), sample(2, "what is it that falls?"), sample(3)]
    spans = [span("blue"), (0, 4), (5, 7), span("ring")]
    together = fill(engine_of(toy), samples, spans)
    alone = [fill(engine_of(toy), [one], [place])[0] for one, place in zip(samples, spans, strict=True)]
    assert together == alone == fill(engine_of(toy), samples, spans, batch_size=2)


def test_the_picture_is_seen_and_the_hidden_word_is_not() -> None:
    toy = build(joint_data(), seed=3)
    with torch.no_grad():
        # The state of the hidden place is that of the picture, so that another picture gives another word.
        toy.network.streams["image"].encoder.patch_embed.weight *= 30
    engine = engine_of(toy)
    answers = {fill(engine, [Sample("a", views={**sample(i).views})], [span("small")])[0] for i in range(8)}
    assert len(answers) > 1
    other = TEXT.replace("small", "large")
    word = span("small")
    assert fill(engine, [sample(0)], [word]) == fill(engine, [sample(0, other)], [word])


def test_the_head_is_the_only_one_at_the_backbone_or_the_one_that_is_named() -> None:
    heads = {
        "alone": {"use": "masked_token", "at": "encoder"},
        "both": {"use": "masked_token"},
        "patches": {"use": "masked_token", "stream": "image", "predicts": "pixels"},
    }
    toy = build(joint_data(heads), seed=4)
    engine, asked = engine_of(toy), ([sample(0)], [span("ring")])
    assert fill(engine, *asked) == fill(engine, *asked, head="both")
    without = [Sample("s0", views={"text": Text(TEXT)})]
    assert fill(engine, *asked, head="alone") == fill(engine, without, asked[1], head="alone")
    with pytest.raises(ConfigError, match="unknown masked_token head for tokens 'patches'"):
        fill(engine, *asked, head="patches")
    with pytest.raises(ConfigError, match="found 0 heads that predict tokens at the backbone, expected one"):
        fill(engine_of(build(encoder_data())), *asked)


def test_what_cannot_be_hidden_is_refused() -> None:
    engine = engine_of(build(joint_data()))
    with pytest.raises(SampleError, match="no token stands at the characters 90 to 95 of its text of 46 characters"):
        fill(engine, [sample(0)], [(90, 95)])
    with pytest.raises(SampleError, match="sample x: has no text in the view 'text'"):
        fill(engine, [Sample("x", views={"image": medium("image", 0)})], [(0, 1)])


def test_every_sample_has_its_span() -> None:
    engine = engine_of(build(joint_data()))
    with pytest.raises(ConfigError, match="found 1 spans for 2 samples, expected one for each"):
        fill(engine, [sample(0), sample(1)], [span("blue")])
    assert fill(engine, [], []) == []


def test_places_count_what_stands_in_front_and_end_where_the_reader_cuts() -> None:
    toy = build(joint_data())
    reader = TextReader(TextReaderConfig(max_tokens=10), Limits(), toy.tokenizer)
    part = Text(TEXT)
    ids = reader.read(part).units[0].tolist()
    assert toy.tokenizer.decode([ids[place] for place in reader.places(part, *span("blue"))]).strip() == "blue"
    assert reader.places(part, *span("ring")) == []
    letters = TextReader(TextReaderConfig(max_tokens=60, bytes=True), Limits(), toy.tokenizer)
    accented = Text("\u00e9t\u00e9 blue")
    found = [letters.read(accented).units[0][place] - 6 for place in letters.places(accented, 4, 8)]
    assert bytes(int(value) for value in found) == b"blue"
