from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest

from polymodal.core.errors import DataError, SampleError
from polymodal.core.parts import Audio, Image, Points, Text
from polymodal.core.samples import Sample, conversation
from polymodal.data import sources
from polymodal.data.sources import JsonlSource, duplicate_ids, open_source, write_jsonl


def view(text: str, **more) -> str:
    return json.dumps({"views": {"text": text}} | more)


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_random_access_skips_blank_lines_and_counts_them(end, chunk, newline, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        (newline.join(["", view("one"), "   ", view("tw\u00f6", id="b"), "  " + view("three")]) + end).encode()
    )
    source = JsonlSource(path)
    assert len(source) == 3
    assert [source[i].views["text"].text for i in (2, 0, 1, -1)] == ["three", "one", "tw\u00f6", "three"]
    assert [source[i].id for i in range(3)] == ["a.jsonl:2", "b", "a.jsonl:5"]
    assert [sample.id for sample in source] == ["a.jsonl:2", "b", "a.jsonl:5"]
    with pytest.raises(IndexError, match="sample 3 of 3"):
        source[3]


def test_media_paths_start_from_the_file_and_sources_travel_to_workers(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"views": {"image": "i/a.jpg", "audio": {"path": "b.wav", "rate_hz": 8000}}}')
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    sample = source[0]
    assert sample.views["image"].path == tmp_path / "i" / "a.jpg" and sample.views["audio"].rate_hz == 8000
    assert sample.id == "data.jsonl:1" and source.name == str(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "sample a.jsonl:2: is not valid JSON"),
        ("[" * 100_000, "sample a.jsonl:2: is not valid JSON"),
        ("[1]", "sample a.jsonl:2: found list, expected an object"),
        ('{"id": 7, "views": {"smell": "x"}}', "sample 7: views.smell: unknown modality"),
        (b"\xff\xfe", "sample a.jsonl:2: is not valid JSON"),
    ],
)
def test_a_malformed_line_is_named_and_others_stay_readable(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(view("x").encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + b"")
    source = JsonlSource(path)
    assert source[0].views["text"].text == "x"
    with pytest.raises(SampleError, match=message):
        source[1]


def test_sources_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read: No such file"):
        open_source(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no samples"):
        open_source(tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no samples"):
        open_source(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"without data.jsonl; name one of: empty.jsonl"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"decompress it to \.jsonl first"):
        open_source(tmp_path / "a.jsonl.gz")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="import the data first"):
        open_source(tmp_path / "sub")


def test_a_file_that_vanishes_is_a_sample_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(view("x"))
    source = JsonlSource(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SampleError, match="cannot be read any more"):
        source[0]


def test_write_round_trip_keeps_paths_valid(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    samples = [
        Sample("1", views={"image": Image("out/a.jpg"), "text": Text("x\ny")}, label="c", meta={"k": [1]}),
        Sample("2", views={"points": Points(tmp_path / "elsewhere" / "b.ply")}),
        conversation(Audio("other/a.wav", rate_hz=8000), "What?", answer="Rain.", id="3"),
    ]
    assert write_jsonl("out/new/../data.jsonl", iter(samples)) == 3
    source = open_source(tmp_path / "out")
    first = json.loads((tmp_path / "out" / "data.jsonl").read_text().splitlines()[0])
    assert first["views"]["image"] == {"path": "a.jpg"}
    assert source[0].views["image"].path == tmp_path / "out" / "a.jpg"
    assert (source[0].label, source[0].meta, source[0].views["text"].text) == ("c", {"k": [1]}, "x\ny")
    assert source[1].views["points"].path == tmp_path / "elsewhere" / "b.ply"
    audio = source[2].media()[0]
    assert audio.path == tmp_path / "other" / "a.wav" and audio.rate_hz == 8000
    assert source[2].messages[1].text == "Rain."


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [conversation("a", id="1")])
    before = path.read_bytes()
    with pytest.raises(SampleError, match="in memory"):
        write_jsonl(path, [conversation("b", id="2"), conversation(Image(np.zeros((2, 2), np.uint8)), id="3")])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["data.jsonl"]


def test_duplicate_ids(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join([view("x", id="p"), view("y"), "{", view("z", id="p"), view("w", id=7), view("v", id="7")])
    )
    assert duplicate_ids(JsonlSource(path)) == {"p": [0, 3], "7": [4, 5]}
    path.write_text(view("x"))
    assert duplicate_ids(JsonlSource(path)) == {}


def test_fingerprint_follows_the_content_and_the_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(view("one"))
    os.utime(path, (1, 1))
    first = JsonlSource(path).fingerprint
    assert first == JsonlSource(path).fingerprint
    path.write_text(view("two"))
    os.utime(path, (1, 1))
    second = JsonlSource(path).fingerprint
    os.utime(path, (2, 2))
    assert len({first, second, JsonlSource(path).fingerprint}) == 3


def test_index_stays_small_and_quick(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((view("x" * 50) + "\n") * 100_000)
    source = JsonlSource(path)
    assert len(source) == 100_000 and source._lines is None
    assert source._starts.nbytes + source._stops.nbytes == 16 * len(source)
    assert source.default_id(99_999) == "a.jsonl:100000"
