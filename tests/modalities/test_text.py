"""Tokenizer, chat formats, token streams and the text reader."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import toys

from polymodal.core.errors import CheckpointError, ConfigError, LimitError, MediaError, SampleError
from polymodal.core.limits import Limits
from polymodal.core.parts import Image, Text
from polymodal.core.samples import Message
from polymodal.modalities.text import (
    CHAT_FORMATS,
    ChatFormat,
    Segment,
    TextReader,
    TextReaderConfig,
    Tokenizer,
    TokenStream,
    chat_format,
    tokenize,
    train_bpe,
)

CONTROLS = sorted({name for chat in CHAT_FORMATS.values() for name in chat.controls})
ALPHABETS = (
    "abc d\n\t",
    "\u00e9\u00df\u0142",
    "\u4f60\u597d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufffd",
    "\u0301\u20e3",
    "<|>/",
)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_bpe([*toys.TEXTS, "na\u00efve \u4f60\u597d \U0001f600 \U0001f600"], 420, CONTROLS)


def any_text(rng: random.Random) -> str:
    """Random text over every plane: letters, combining marks, emoji, control characters, control strings."""
    pieces = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        if kind < 0.5:
            pieces.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6))))
        elif kind < 0.7:
            pieces.append(rng.choice([*CONTROLS, "<|media|>", "<|pad|>"]))
        else:
            point = rng.randint(0, 0x10FFFF)
            pieces.append(chr(point) if not 0xD800 <= point <= 0xDFFF else "?")
    return "".join(pieces)


def test_any_text_survives_the_round_trip_and_holds_no_control_token(words: Tokenizer) -> None:
    rng = random.Random(0)
    controls = set(words.controls.values())
    for _ in range(400):
        text = any_text(rng)
        ids = words.encode(text)
        assert words.decode(ids) == text
        assert not controls & set(ids)


def test_pieces_of_a_stream_are_the_decoded_text_for_any_ids(words: Tokenizer) -> None:
    rng = random.Random(1)
    for turn in range(300):
        ids = (
            words.encode(any_text(rng)) if turn % 2 else [rng.randrange(words.size) for _ in range(rng.randint(0, 30))]
        )
        stream = TokenStream(words)
        pieces = [stream.push(id) for id in ids]
        assert "".join(pieces) + stream.finish() == words.decode(ids)


def test_a_stream_holds_back_half_a_character(words: Tokenizer) -> None:
    plain = train_bpe([], 256 + 2)
    ids = plain.encode("a\U0001f600b")
    stream = TokenStream(plain)
    assert [stream.push(id) for id in ids] == ["a", "", "", "", "\U0001f600", "b"]
    stream = TokenStream(plain)
    assert [stream.push(id) for id in ids[:3]] == ["a", "", ""]
    assert stream.finish() == plain.decode(ids[:3])[1:]


def test_digits_are_single_tokens(words: Tokenizer) -> None:
    assert len(words.encode("2026")) == 4


def test_controls_are_reached_by_name_only(words: Tokenizer) -> None:
    assert words.control("<|media|>") == words.media_id != words.pad_id
    assert words.media_id not in words.encode("<|media|>")
    ids = [words.control("<|user|>"), *words.encode("hi"), words.control("<|end|>")]
    assert words.decode(ids) == "hi"
    assert words.decode(ids, with_controls=True) == "<|user|>hi<|end|>"
    with pytest.raises(ConfigError, match=r"unknown control token '<\|usr\|>'; did you mean '<\|user\|>'"):
        words.control("<|usr|>")


def test_a_saved_tokenizer_is_the_same(words: Tokenizer, tmp_path: Path) -> None:
    words.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.size == words.size and again.controls == words.controls
    rng = random.Random(2)
    for _ in range(50):
        text = any_text(rng)
        assert again.encode(text) == words.encode(text)
        assert not set(again.encode(text)) & set(again.controls.values())


def test_controls_that_a_format_needs_are_added_behind_the_others(words: Tokenizer, tmp_path: Path) -> None:
    train_bpe(toys.TEXTS, 300).save(tmp_path / "tokenizer.json")
    grown = Tokenizer.load(tmp_path / "tokenizer.json", ("<|im_start|>",))
    assert grown.control("<|im_start|>") == grown.size - 1 == 300
    assert grown.control("<|im_start|>") not in grown.encode("<|im_start|>")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read: No such file"):
        Tokenizer.load(tmp_path / "none.json")
    for content in ("{", "[]", '{"model": 3}', "\x00"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"bad.json: is not a tokenizer.json"):
            Tokenizer.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"bad.json: is not a tokenizer.json"):
        Tokenizer.load(tmp_path / "bad.json")


def test_a_vocabulary_must_hold_the_bytes() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size: found 200, expected at least 258 \(256 bytes and 2 control"):
        train_bpe(toys.TEXTS, 200)
    assert train_bpe([], 258).size == 258


def spans(chat: ChatFormat, *turns: tuple[str, str], prompt: bool = False) -> tuple[str, list[str]]:
    """The rendered text, and its supervised runs."""
    segments = chat.render([Message(role, (Text(text),)) for role, text in turns], id="s", prompt=prompt)
    whole, runs, was_supervised = "", [""], False
    for segment in segments:
        shown = segment.text or segment.control
        whole += shown
        if segment.is_supervised:
            runs[-1:] = [runs[-1] + shown] if was_supervised else [*runs[-1:], shown]
        was_supervised = segment.is_supervised
    return whole, [run for run in runs if run]


TURNS = (("system", "Be brief."), ("user", "What?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes."))
RENDERED = {
    "turns": (
        "<|system|>Be brief.<|user|>What?<|assistant|>A cat.<|end|><|user|>Sure?<|assistant|>Yes.<|end|>",
        ["A cat.<|end|>", "Yes.<|end|>"],
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat."
        "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
        ["A cat.<|im_end|>", "Yes.<|im_end|>"],
    ),
    "vicuna": (
        "{start}Be brief. USER: What? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>",
        [" A cat.</s>", " Yes.</s>"],
    ),
    "minigpt-4": (
        "{start}Be brief.###Human: What?###Assistant: A cat.###{end}Human: Sure?###Assistant: Yes.###{end}",
        [" A cat.###{end}", " Yes.###{end}"],
    ),
    "none": ("{start}Be brief.What?A cat.{end}Sure?Yes.{end}", ["A cat.{end}", "Yes.{end}"]),
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST] Yes. </s>",
        [" A cat. </s>", " Yes. </s>"],
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nWhat? [/INST] A cat.</s>[INST] Sure? [/INST] Yes.</s>",
        [" A cat.</s>", " Yes.</s>"],
    ),
}
RENDERED["qwen"] = RENDERED["chatml"]


@pytest.mark.parametrize("name", RENDERED)
def test_formats_render_and_supervise_the_assistants_own_words(name: str) -> None:
    assert spans(chat_format(name), *TURNS) == RENDERED[name]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_prompt_ends_where_an_answer_begins(name: str) -> None:
    chat = chat_format(name)
    prompt, supervised = spans(chat, *TURNS[:2], prompt=True)
    whole, _ = spans(chat, *TURNS[:3])
    assert supervised == []
    assert whole.startswith(prompt) and whole[len(prompt) :].lstrip(" ").startswith("A cat.")
    with pytest.raises(SampleError, match="the last message is the assistant's"):
        spans(chat, *TURNS[:3], prompt=True)


@pytest.mark.parametrize("name", RENDERED)
def test_every_control_of_a_format_is_declared(name: str) -> None:
    chat = chat_format(name)
    for turn in (chat.system, chat.user, chat.assistant):
        for item in (*turn.before, *turn.after, *chat.start):
            assert (item in chat.controls) == (item.startswith("<") or item == "{end}") or item == "{start}"
    assert chat.end in chat.controls and chat.end in chat.assistant.after


def test_formats_with_a_system_turn_of_their_own_begin_with_it() -> None:
    whole, _ = spans(chat_format("qwen"), *TURNS[1:2], prompt=True)
    assert whole == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    whole, _ = spans(chat_format("vicuna"), *TURNS[1:2], prompt=True)
    assert whole.startswith("{start}A chat between a curious user") and whole.endswith(
        "questions. USER: What? ASSISTANT:"
    )
    assert spans(chat_format("llama-2"), *TURNS[1:2], prompt=True)[0] == "<s>[INST] What? [/INST]"


def test_texts_that_touch_are_encoded_as_one(words: Tokenizer) -> None:
    chat = chat_format("vicuna")
    messages = [Message("system", (Text("a"),)), Message("user", (Text("What is"), Text(" on the left?")))]
    runs = list(tokenize(chat.render(messages, id="s", prompt=True), words))
    assert [words.decode(run.ids) for run in runs] == ["", "a USER: What is on the left? ASSISTANT:"]
    assert list(runs[1].ids) == words.encode("a USER: What is on the left? ASSISTANT:")
    answered = [*messages, Message("assistant", (Text("A cube."),))]
    runs = list(tokenize(chat.render(answered, id="s"), words))
    assert [(words.decode(run.ids), run.is_supervised) for run in runs[1:]] == [
        ("a USER: What is on the left? ASSISTANT:", False),
        (" A cube.", True),
        ("", True),
    ]
    assert runs[-1].ids == (words.control("</s>"),)


def test_control_tokens_in_a_formats_own_text_are_meant_and_in_a_persons_are_not(words: Tokenizer) -> None:
    segments = [Segment(text="a<|end|>b", is_fixed=True), Segment(text="c<|end|>")]
    first, control, second = tokenize(segments, words)
    assert control.ids == (words.control("<|end|>"),)
    assert words.decode(first.ids) == "a" and words.decode(second.ids) == "bc<|end|>"


def test_media_cannot_be_an_answer() -> None:
    with pytest.raises(SampleError, match="sample s: image in an assistant turn; only text can be an answer"):
        chat_format("turns").render([Message("assistant", (Image(b"x"),))], id="s")


def layout(name: str, *parts: Text | Image) -> list[str]:
    segments = chat_format(name).render([Message("user", parts)], id="s", prompt=True)
    return [each.text or each.control or "MEDIA" for each in segments]


def test_media_stand_first_where_a_format_says_so(words: Tokenizer) -> None:
    assert layout("blip-2", Text("What?"), Image(b"x")) == ["MEDIA", "{start}", "What?"]
    assert layout("blip-2-t5", Text("What?"), Image(b"x")) == ["MEDIA", "What?", "</s>", "<pad>"]
    assert layout("none", Text("What?"), Image(b"x")) == ["{start}", "What?", "MEDIA"]
    messages = [Message("user", (Text("Hm"),)), Message("assistant", (Image(b"x"), Text("A cat.")))]
    with pytest.raises(SampleError, match="sample s: image in an assistant turn"):
        chat_format("blip-2").render(messages, id="s")


def test_a_format_may_mark_media() -> None:
    found = layout("minigpt-4", Image(b"x"), Text("What?"))
    assert found[3:] == ["Human: ", "<Img>", "MEDIA", "</Img> ", "What?", "###", "Assistant:"]


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown chat format 'chatm'; did you mean 'chatml'"):
        chat_format("chatm")


def test_the_text_reader_measures_what_it_reads(words: Tokenizer) -> None:
    reader = TextReader(TextReaderConfig(max_tokens=5), Limits(), words)
    for text in ("a", "What is on the left? A red cube."):
        result = reader.read(Text(text))
        assert reader.measure(Text(text)) == result.lengths == (len(result.units[0]),)
        assert result.units[0].dtype == np.int64
        assert result.units[0].tolist() == words.encode(text)[:5]
    assert reader.unit_shape == () and reader.is_ragged


def test_texts_that_are_empty_or_too_long_are_refused(words: Tokenizer) -> None:
    reader = TextReader(TextReaderConfig(), Limits(text_chars=10), words)
    with pytest.raises(MediaError, match="text: is empty; a text stream needs at least one token"):
        reader.measure(Text(""))
    with pytest.raises(LimitError, match=r"text: 11 characters, the limit \(text_chars\) is 10"):
        reader.read(Text("x" * 11))


def test_a_reader_may_add_the_tokens_that_frame_a_text_and_fill_up(words: Tokenizer, tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "cube"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    config = TextReaderConfig.parse({"max_tokens": 4, "tokenizer": str(tmp_path), "add_special": True})
    assert config.tokenizer is not None and config.tokenizer.path == str(tmp_path)
    own = Tokenizer.load(config.tokenizer.path)
    for text, expected in (("red cube", [2, 5, 7, 3]), ("red blue cube", [2, 5, 6, 3]), ("", [2, 3])):
        assert TextReader(config, Limits(), own).read(Text(text)).units[0].tolist() == expected
    filled = config.model_copy(update={"fill": True, "add_special": False})
    assert TextReader(filled, Limits(), own).read(Text("red")).units[0].tolist() == [5, 0, 0, 0]


def test_a_framed_tokenizer_puts_its_start_and_end_around_texts_that_ask(tmp_path):
    framed = train_bpe(toys.TEXTS, 300, framed=True)
    assert (framed.prefix, framed.suffix) == ([framed.control("<|start|>")], [framed.control("<|end|>")])
    assert (framed.bos_id, framed.eos_id) == (framed.prefix[0], framed.suffix[0])
    plain = train_bpe(toys.TEXTS, 300)
    assert (plain.prefix, plain.suffix) == ([], []) and plain.bos_id is None
    text = "A red <|start|> star."
    assert framed.decode(framed.encode(text)) == text and framed.prefix[0] not in framed.encode(text)
    framed.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.prefix, again.suffix, again.bos_id, again.eos_id) == (
        framed.prefix, framed.suffix, framed.bos_id, framed.eos_id
    )  # fmt: skip
