"""Sources cut down to the samples whose media a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polymodal.core.errors import DataError, SampleError
from polymodal.data.selection import ModalitySource
from polymodal.data.sources import open_source


def line(id: str, *kinds: str) -> dict[str, Any]:
    parts = [{"type": kind, "path": f"{id}.x"} for kind in kinds] + [{"type": "text", "text": "What?"}]
    return {"id": id, "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    lines = [
        line("a", "image"),
        line("b", "audio"),
        line("c"),
        line("d", "image", "audio"),
        line("e", "image", "image"),
    ]
    rows = [*map(json.dumps, lines), "{broken"]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    return tmp_path / "data.jsonl"


def test_samples_with_other_media_are_left_out_and_broken_ones_stay(path: Path) -> None:
    source = ModalitySource(open_source(path), ["image"])
    assert len(source) == 4
    assert [source[index].id for index in range(3)] == ["a", "c", "e"]
    with pytest.raises(SampleError, match=r"data\.jsonl:6"):
        source[3]
    assert source.name == str(path)


def test_the_selection_is_part_of_the_fingerprint(path: Path) -> None:
    whole = open_source(path)
    prints = {ModalitySource(whole, names).fingerprint for names in ([], ["image"], ["image", "audio"])}
    assert len(prints | {whole.fingerprint}) == 4
    assert ModalitySource(whole, ["audio", "image"]).fingerprint in prints


def test_a_selection_that_leaves_nothing_or_names_nothing_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(line("a", "image")))
    with pytest.raises(DataError, match=r"one.jsonl: none of its 1 samples has media of \['audio'\] alone"):
        ModalitySource(open_source(tmp_path / "one.jsonl"), ["audio"])
    with pytest.raises(DataError, match="unknown modality 'imgae'; did you mean 'image'"):
        ModalitySource(open_source(path), ["imgae"])
