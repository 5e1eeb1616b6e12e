"""Captioning and filtering: what is kept, what is dropped, what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from polymodal.core.errors import DataError
from polymodal.data.sources import open_source
from polymodal.inference.sampling import Sampling
from polymodal.recipes.capfilt import capfilt

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Judge:
    """Vectors that know colours: of a picture by its pixels, of a text by its words; noise keeps pairs apart."""

    can_match = False

    def embed(self, parts: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        rows = []
        for part in parts:
            if isinstance(part, str):
                row = [float(name in part) for name in COLOURS]
            else:
                from polymodal.core.limits import Limits
                from polymodal.modalities.image.decode import decode_image

                row = (decode_image(part, Limits())[0, 0] / 255.0).tolist()
            rows.append(np.asarray([*row, 0.1], np.float32))
        return np.stack([row / np.linalg.norm(row) for row in rows])


class Matcher(Judge):
    """A matching head: sure of what the vectors say, and a little off, so that 0.5 is where it decides."""

    can_match = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def match(self, samples: Sequence[Any], batch_size: int = 256) -> np.ndarray:
        self.asked.append(len(samples))
        pairs = [(sample.views["image"], sample.views["text"].text) for sample in samples]
        cosines = [float(self.embed([image])[0] @ self.embed([text])[0]) for image, text in pairs]
        return np.asarray([0.9 if cosine > 0.5 else 0.1 for cosine in cosines], np.float32)


class Writer:
    """Says the colour of every third picture wrongly."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Sampling]] = []

    def caption(self, media: Sequence[Any], request: str, sampling: Sampling) -> list[str]:
        self.asked.append((request, sampling))
        names = list(COLOURS)
        return [f"something {names[(i + (i % 3 == 0)) % 3]}" for i in (int(Path(m.path).stem) for m in media)]


@pytest.fixture
def data(tmp_path):
    """Twelve pictures; the text of every fourth is of another colour."""
    names = list(COLOURS)
    lines = []
    for i in range(12):
        Pillow.new("RGB", (4, 4), COLOURS[names[i % 3]]).save(tmp_path / f"{i}.png")
        said = names[(i + (i % 4 == 0)) % 3]
        lines.append({"id": f"{i}-x", "views": {"image": {"path": f"{i}.png"}, "text": f"a {said} thing"}})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_wrong_texts_are_dropped_and_right_ones_kept(data, tmp_path):
    writer, out = Writer(), tmp_path / "out" / "kept.jsonl"
    seen = []
    report = capfilt(data, out, writer, Judge(), threshold=0.5, batch_size=5, progress=lambda *done: seen.append(done))
    assert report.kept == {"original": 9, "synthetic": 8}
    assert report.dropped == {"original": 3, "synthetic": 4}
    assert report.num_written == 17 and seen[-1] == (12, 12)
    assert {request for request, _ in writer.asked} == {"Describe this image."}
    assert all(sampling.temperature == 0 for _, sampling in writer.asked)
    assert report.judged_by == "similarity"
    kept = open_source(out)
    names = list(COLOURS)
    for index in range(len(kept)):
        sample = kept[index]
        assert names[int(sample.id.split("-")[0]) % 3] in sample.views["text"].text
        assert sample.views["image"].path.is_file()
        assert sample.meta["fit"] >= 0.5 and sample.meta["caption"] in ("original", "synthetic")


def test_the_threshold_is_what_few_mismatched_pairs_reach(data, tmp_path):
    loose = capfilt(data, tmp_path / "a.jsonl", None, Judge(), false_accept=0.9)
    strict = capfilt(data, tmp_path / "b.jsonl", None, Judge(), false_accept=0.1)
    assert loose.threshold <= strict.threshold
    assert "synthetic" not in strict.kept


def test_a_matching_head_decides_by_itself(data, tmp_path):
    judge, writer = Matcher(), Writer()
    nucleus = Sampling(temperature=1.0, top_p=0.9, seed=1)
    report = capfilt(data, tmp_path / "a.jsonl", writer, judge, request="", sampling=nucleus)
    assert (report.judged_by, report.threshold) == ("matching", 0.5)
    assert report.kept == {"original": 9, "synthetic": 8} and report.dropped == {"original": 3, "synthetic": 4}
    assert writer.asked == [("", nucleus)]
    # Pairs alone were judged, and none that nobody asked for.
    assert sum(judge.asked) == 24
    kept = open_source(tmp_path / "a.jsonl")
    assert {kept[i].meta["fit"] for i in range(len(kept))} == {0.9}


def test_a_matching_head_can_be_held_to_a_share_of_mismatches(data, tmp_path):
    report = capfilt(data, tmp_path / "a.jsonl", None, Matcher(), false_accept=0.9)
    assert report.threshold < 0.5 and report.kept == {"original": 12}


def test_labels_stay_with_the_text_they_were_told_with(data, tmp_path):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("\n".join(json.dumps({**line, "label": "x"}) for line in lines) + "\n")
    capfilt(data, tmp_path / "a.jsonl", Writer(), Matcher(), threshold=0.0)
    kept = open_source(tmp_path / "a.jsonl")
    assert {(kept[i].meta["caption"], kept[i].label) for i in range(24)} == {("original", "x"), ("synthetic", None)}


def test_unusable_samples_are_named(data, tmp_path):
    (data.parent / "3.png").write_bytes(b"no picture")
    with data.open("a") as file:
        file.write(json.dumps({"id": "alone", "views": {"text": "no medium"}}) + "\n")
    report = capfilt(data, tmp_path / "out.jsonl", None, Judge(), threshold=0.5)
    assert [name for name, _ in report.skipped] == ["3-x", "alone"] or [name for name, _ in report.skipped] == [
        "alone",
        "3-x",
    ]
    assert report.num_samples == 13
    assert any("expected one medium and a text" in reason for _, reason in report.skipped)


def test_bad_requests_are_refused(data, tmp_path):
    with pytest.raises(DataError, match="found both false_accept and threshold, expected one"):
        capfilt(data, tmp_path / "o.jsonl", None, Judge(), false_accept=0.1, threshold=0.5)
    with pytest.raises(DataError, match="false_accept: found 2, expected a share"):
        capfilt(data, tmp_path / "o.jsonl", None, Judge(), false_accept=2)
    (tmp_path / "o.jsonl").write_text("")
    with pytest.raises(DataError, match=r"o.jsonl: exists; choose another file"):
        capfilt(data, tmp_path / "o.jsonl", None, Judge())
