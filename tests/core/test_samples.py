"""Samples to JSON and back, OpenAI's part types, data URLs, and JSON that means harm."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from polymodal.core.errors import PolymodalError, SampleError
from polymodal.core.parts import Audio, Image, Sensor, Text
from polymodal.core.samples import Message, Sample, conversation, named, sample_from_json, sample_to_json

PNG = base64.b64encode(b"\x89PNG....").decode()
CONVERSATION: dict[str, Any] = {
    "id": "7",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "See"},
                {"type": "image", "path": "media/a.jpg"},
                {"type": "text", "text": "and hear"},
                {"type": "audio", "path": "b.wav", "rate_hz": 8000},
                {"type": "video", "path": "c.npy", "fps": 2.5},
                {"type": "points", "path": "d.ply"},
                {"type": "sensor", "path": "e.npy", "channels": ["x", "y"], "rate_hz": 50},
            ],
        },
        {"role": "assistant", "content": "A cat."},
    ],
    "meta": {"family": "what", "list": [1, None]},
}
VIEWS: dict[str, Any] = {
    "id": "8",
    "views": {"image": {"path": "a.jpg"}, "text": "a cat", "sensor": {"path": "s.csv", "rate_hz": 10}},
    "label": "cat",
}


@pytest.mark.parametrize("data", [CONVERSATION, VIEWS], ids=["conversation", "views"])
def test_json_goes_in_and_comes_out_the_same(data: dict[str, Any], tmp_path: Path) -> None:
    sample = sample_from_json(data, tmp_path, "line 1")
    assert sample_to_json(sample, tmp_path) == data
    text = json.dumps(sample_to_json(sample, tmp_path))
    assert sample_to_json(sample_from_json(json.loads(text), tmp_path, "x"), tmp_path) == data


def test_parts_carry_their_details(tmp_path: Path) -> None:
    sample = sample_from_json(CONVERSATION, tmp_path, "x")
    image, audio, video, _, sensor = sample.media()
    assert image.path == tmp_path / "media/a.jpg"
    assert isinstance(audio, Audio) and audio.rate_hz == 8000
    assert video.fps == 2.5  # type: ignore[attr-defined]
    assert isinstance(sensor, Sensor) and sensor.channels == ("x", "y") and sensor.rate_hz == 50
    assert [m.text for m in sample.messages] == ["Be brief.", "Seeand hear", "A cat."]


def test_paths_outside_the_root_stay_as_they_are(tmp_path: Path) -> None:
    sample = sample_from_json({"views": {"image": "/data/a.jpg"}}, tmp_path, "x")
    assert sample_to_json(sample, tmp_path)["views"]["image"]["path"] == "/data/a.jpg"


def test_openai_part_types_and_urls(tmp_path: Path) -> None:
    url = f"data:image/png;base64,{PNG}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "file:///tmp/a.mp4"}},
        {"type": "image", "data": PNG},
    ]
    sample = sample_from_json({"messages": [{"role": "user", "content": content}]}, tmp_path, "x")
    first, second, audio, video, inline = sample.media()
    assert first.source == second.source == inline.source == b"\x89PNG...."
    assert isinstance(audio, Audio) and audio.source == b"\x89PNG...."
    assert video.path == Path("/tmp/a.mp4")


def part(**data: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [data]}]}


BAD: list[tuple[Any, str]] = [
    ([], "sample L: found list, expected an object with 'messages' or 'views'"),
    (None, "found NoneType"),
    ({}, "found keys [], expected exactly one of 'messages' and 'views'"),
    ({"messages": [], "views": {}}, "expected exactly one of"),
    ({"mesages": []}, "unknown key 'mesages'; did you mean 'messages'"),
    ({"messages": []}, "messages: expected a list with at least one message"),
    ({"messages": {"role": "user"}}, "messages: expected a list"),
    ({"messages": ["hi"]}, "messages[0]: expected an object with 'role' and 'content'"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0]: unknown role 'usr'; did you mean 'user'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]: unknown role ['user']"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: found int, expected a string or a list"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content: holds half of a surrogate pair"),
    (part(type="text"), "messages[0].content[0].text: found NoneType, expected a string"),
    (part(type="text", text="a\udfff"), "messages[0].content[0].text: holds half of a surrogate pair"),
    (part(kind="image"), "messages[0].content[0]: expected an object with 'type'"),
    (part(type="imag", path="a"), "unknown part type 'imag'; did you mean 'image'"),
    (part(type={}), "unknown part type {}"),
    (part(type="image"), "found no source, expected exactly one of path, data, url"),
    (part(type="image", path="a", data=PNG), "found ['path', 'data'], expected exactly one"),
    (part(type="image", path=3), "messages[0].content[0].path: found int, expected a string"),
    (part(type="image", path="a", rate_hz=3), "unknown key 'rate_hz'; did you mean 'path'? Valid: data, path, url"),
    (part(type="image", data="***"), "the data is not valid base64"),
    (part(type="image", url="http://x/y.png"), "found the URL 'http://x/y.png'; samples take data: and file: URLs"),
    (part(type="image", url="data:image/png,abc"), "a data URL must read data:<type>;base64,<data>"),
    (part(type="image_url", image_url=None), "found no source"),
    (part(type="input_audio", input_audio="x"), "found no source"),
    (
        part(type="audio", path="a", rate_hz="8k"),
        "messages[0].content[0].rate_hz: found '8k', expected a number above 0",
    ),
    (part(type="audio", path="a", rate_hz=-1), "rate_hz: found -1, expected a number above 0"),
    (part(type="audio", path="a", rate_hz=float("nan")), "rate_hz: found nan"),
    (part(type="audio", path="a", rate_hz=float("inf")), "rate_hz: found inf"),
    (part(type="audio", path="a", rate_hz=True), "rate_hz: found True"),
    (part(type="sensor", path="a", channels=3), "channels: found 3, expected a list of names"),
    (part(type="sensor", path="a", channels="xy"), "channels: found 'xy', expected a list of names"),
    (part(type="sensor", path="a", channels=[1]), "channels: found [1], expected a list of names"),
    ({"id": [1], "views": {"image": "a"}}, "id: found list, expected a string of at most 1000 or a number"),
    ({"id": "x" * 1001, "views": {"image": "a"}}, "id: found 1,001 characters, expected a string of at most 1000"),
    ({"views": {}}, "views: expected an object from modality to path or text, with at least one entry"),
    ({"views": ["a"]}, "views: expected an object"),
    ({"views": {"imgae": "a"}}, "views.imgae: unknown modality 'imgae'; did you mean 'image'"),
    ({"views": {"text": 3}}, "views.text: found int, expected a string"),
    ({"views": {"image": 3}}, "views.image: found int, expected a path or an object"),
    ({"views": {"image": "a"}, "meta": 3}, "meta: found int, expected an object"),
    ({"views": {"image": "a"}, "label": {"a": 1}}, "label: found dict, expected a string or a number"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_what_is_no_sample_is_refused_by_name(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError) as error:
        sample_from_json(data, tmp_path, "L")
    assert str(error.value).startswith("sample L: ") and message in str(error.value)


def test_mutated_json_is_a_sample_or_a_named_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    strange: list[Any] = [
        None,
        0,
        -1,
        1e400,
        "",
        "\x00",
        "a" * 5000,
        [],
        {},
        [[]],
        {"type": "image"},
        True,
        "\ud800",
        PNG,
    ]

    def mutate(value: Any) -> Any:
        if rng.random() < 0.12:
            return rng.choice(strange)
        if isinstance(value, dict):
            return {
                (key if rng.random() > 0.05 else rng.choice(["", "type", "id"])): mutate(v) for key, v in value.items()
            }
        return [mutate(item) for item in value] if isinstance(value, list) else value

    outcomes = {"sample": 0, "error": 0}
    for turn in range(1500):
        data = mutate(rng.choice([CONVERSATION, VIEWS]))
        try:
            sample = sample_from_json(data, tmp_path, f"line {turn}")
        except SampleError as error:
            outcomes["error"] += 1
            assert len(str(error)) < 1500
            continue
        outcomes["sample"] += 1
        for media in sample.media():
            with pytest.raises(PolymodalError):
                media.read_bytes(100)
    assert min(outcomes.values()) > 50


def test_a_part_in_memory_cannot_be_written() -> None:
    with pytest.raises(SampleError, match="sample s: image: the part is in memory and cannot be written as JSON"):
        sample_to_json(conversation(Image(b"x"), "what?", id="s"))


def test_without_drops_modalities_and_keeps_the_words(tmp_path: Path) -> None:
    sample = sample_from_json(CONVERSATION, tmp_path, "x").without("image", "video")
    assert [media.modality for media in sample.media()] == ["audio", "points", "sensor"]
    assert sample.messages[1].text == "Seeand hear"
    views = sample_from_json(VIEWS, tmp_path, "x").without("text", "sensor")
    assert list(views.views) == ["image"] and views.label == "cat"


def test_conversation_makes_text_of_strings() -> None:
    sample = conversation("a", Image(b"x"), answer="b")
    assert [type(part) for part in sample.messages[0].parts] == [Text, Image]
    assert sample.messages[1] == Message("assistant", sample.messages[1].parts)
    assert Sample("x").media() == ()


def test_an_error_is_named_once() -> None:
    sample = Sample("s")
    error = named(sample, PolymodalError("is odd"))
    assert str(error) == "sample s: is odd"
    assert named(sample, error) is error
