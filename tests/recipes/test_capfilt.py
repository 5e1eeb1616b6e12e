"""Captioning and filtering: what is kept, what is dropped, what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from polymodal.core.errors import DataError
from polymodal.data.sources import open_source
from polymodal.recipes.capfilt import capfilt

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Judge:
    """Vectors that know colours: of a picture by its pixels, of a text by its words; noise keeps pairs apart."""

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


class Writer:
    """Says the colour of every third picture wrongly."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, samples: Sequence[Any], max_new_tokens: int = 32) -> list[str]:
        self.asked += [part.text for s in samples for part in s.messages[0].parts if part.modality == "text"]
        names = list(COLOURS)
        return [
            f"something {names[(i + (i % 3 == 0)) % 3]}" for i in (int(sample.id.split("-")[0]) for sample in samples)
        ]


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
    assert set(writer.asked) == {"Describe this image."}
    kept = open_source(out)
    names = list(COLOURS)
    for index in range(len(kept)):
        sample = kept[index]
        assert names[int(sample.id.split("-")[0]) % 3] in sample.views["text"].text
        assert sample.views["image"].path.is_file()
        assert sample.meta["similarity"] >= 0.5 and sample.meta["caption"] in ("original", "synthetic")


def test_the_threshold_is_what_few_mismatched_pairs_reach(data, tmp_path):
    loose = capfilt(data, tmp_path / "a.jsonl", None, Judge(), false_accept=0.9)
    strict = capfilt(data, tmp_path / "b.jsonl", None, Judge(), false_accept=0.1)
    assert loose.threshold <= strict.threshold
    assert "synthetic" not in strict.kept


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
    with pytest.raises(DataError, match="false_accept: found 2, expected a share"):
        capfilt(data, tmp_path / "o.jsonl", None, Judge(), false_accept=2)
    (tmp_path / "o.jsonl").write_text("")
    with pytest.raises(DataError, match=r"o.jsonl: exists; choose another file"):
        capfilt(data, tmp_path / "o.jsonl", None, Judge())
