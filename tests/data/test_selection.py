"""Sources cut down to the samples whose media a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polymodal.core.errors import DataError, SampleError
from polymodal.core.parts import media_part
from polymodal.core.samples import Sample, conversation
from polymodal.data.selection import ModalitySource, described
from polymodal.data.sources import open_source
from polymodal.training.stage import DataEntry


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


def exchange(text: str = "A red star.", *kinds: str) -> Sample:
    parts = [media_part(kind, Path(f"a.{kind}")) for kind in kinds or ("image",)]
    return conversation(*parts, "What is this?", answer=text, id="a")


def test_a_description_becomes_a_view_set_of_the_medium_and_the_answer() -> None:
    sample = described(exchange())
    assert set(sample.views) == {"image", "text"}
    assert (sample.views["text"].text, sample.label, sample.messages) == ("A red star.", "A red star.", ())
    assert described(sample) is sample


@pytest.mark.parametrize("wrong", [exchange("x", "image", "audio"), exchange(" "), conversation("Hi", answer="Ho")])
def test_a_conversation_of_another_form_is_named(wrong: Sample) -> None:
    with pytest.raises(SampleError, match="expected a question about one medium and its answer"):
        described(wrong)


def test_a_source_entry_reads_conversations_as_view_sets(tmp_path: Path) -> None:
    (tmp_path / "names.jsonl").write_text(json.dumps(line("a", "image")) + "\n" + json.dumps(line("b", "audio")))
    entry = DataEntry(path="names.jsonl", modalities=("image",), as_views=True)
    source = entry.open(tmp_path)
    assert [set(source[index].views) for index in range(len(source))] == [{"image", "text"}]
    assert source.fingerprint != entry.model_copy(update={"as_views": False}).open(tmp_path).fingerprint
    assert source.name.endswith("names.jsonl")
