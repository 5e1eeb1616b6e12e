from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile

from polymodal.core.errors import DataError
from polymodal.core.limits import Limits
from polymodal.data.importers import IMPORTERS
from polymodal.data.inspect import Spread, inspect_source

SHARED = Path(os.environ.get("POLYMODAL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
COCO = SHARED / "coco-mini"


@pytest.fixture
def corpus(tmp_path):
    for i, width in enumerate((10, 20, 40)):
        PIL.Image.new("RGB", (width, 8)).save(tmp_path / f"{i}.png")
    np.save(tmp_path / "nan.npy", np.full((5, 3), np.nan, np.float32))
    (tmp_path / "broken.png").write_bytes(b"<html>")
    soundfile.write(tmp_path / "a.wav", np.zeros(4000, np.float32), 8000)
    np.save(tmp_path / "a.npy", np.zeros((12, 3), np.float32))
    (tmp_path / "a.csv").write_text("time,x\n0,1\n0.5,2\n1,3\n")
    frames = [PIL.Image.new("RGB", (16, 8), (i * 60, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    ask = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "What?"}]
    records = [
        {"id": "1", "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "Grey."}]},
        {"id": "2", "views": {"image": "1.png", "text": "four", "audio": "a.wav", "video": "a.gif"}, "label": "x"},
        {"id": "2", "views": {"image": "2.png", "points": "a.npy", "sensor": "a.csv"}},
        {"id": "4", "views": {"image": "0.png"}},
        {"id": "5", "views": {"image": "gone.png"}},
        {"id": "6", "views": {"image": "broken.png"}},
        {"id": "7", "views": {"image": "broken.png"}},
        {"id": "8", "views": {"points": "nan.npy"}},
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "{", ""]))
    return tmp_path


def test_everything_is_counted_and_named(corpus):
    found = inspect_source(corpus)
    assert (found.samples, found.conversations, found.view_sets, found.labelled) == (9, 1, 7, 1)
    assert found.turns == {"user": 1, "assistant": 1}
    assert found.modalities == {"image": 7, "text": 2, "audio": 1, "video": 1, "points": 2, "sensor": 1}
    assert found.items["image"] == 7 and found.files["image"] == 4
    assert found.sizes["image"]["width_px"] == Spread(3, 10.0, 20.0, 40.0)
    assert found.sizes["audio"]["duration_s"].max == pytest.approx(0.5)
    assert found.sizes["video"]["frames"].max == 4
    assert found.sizes["points"]["points"] == Spread(2, 5, 8.5, 12)
    assert found.sizes["sensor"]["rate_hz"].median == pytest.approx(2.0)
    assert found.text_chars == {
        "user": Spread(1, 5, 5, 5), "assistant": Spread(1, 5, 5, 5), "view": Spread(1, 4, 4, 4),
    }  # fmt: skip
    assert [(p.sample, p.reason[:12]) for p in found.malformed] == [("data.jsonl:9", "is not valid")]
    assert [(p.sample, Path(p.item).name) for p in found.missing] == [("5", "gone.png")]
    assert [(p.sample, Path(p.item).name) for p in found.broken] == [("6", "broken.png"), ("7", "broken.png")]
    assert found.duplicate_ids == {"2": 2} and not found.is_clean and not found.decoded
    assert json.loads(json.dumps(found.to_data()))["sizes"]["image"]["width_px"]["median"] == 20


def test_decoding_finds_damage_behind_the_header(corpus):
    found = inspect_source(corpus / "data.jsonl", decode=True)
    assert [p.sample for p in found.broken] == ["6", "7", "8"] and found.decoded
    assert "5 of 5 points are NaN" in found.broken[-1].reason and found.sizes["points"]["points"].count == 1


def test_limits_count_as_broken_and_a_missing_source_is_an_error(corpus):
    found = inspect_source(corpus, Limits(image_pixels=100))
    assert {p.sample for p in found.broken} == {"2", "6", "7"}
    assert any("image_pixels" in p.reason for p in found.broken)
    with pytest.raises(DataError, match="cannot be read"):
        inspect_source(corpus / "gone.jsonl")


@pytest.mark.skipif(not COCO.is_dir(), reason=f"{COCO} is absent")
def test_real_coco_is_clean(tmp_path):
    IMPORTERS["coco-captions"](COCO / "captions.json", tmp_path / "data.jsonl")
    found = inspect_source(tmp_path)
    assert found.is_clean and found.samples == 400
    assert found.items == {"image": 400} and found.files == {"image": 80}
    assert found.sizes["image"]["width_px"].count == 80 and found.sizes["image"]["width_px"].max <= 640
