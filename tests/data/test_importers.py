from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from polymodal.core.errors import ConfigError, DataError
from polymodal.core.parts import Image, Text
from polymodal.data.importers import IMPORTERS
from polymodal.data.sources import duplicate_ids, open_source

SHARED = Path(os.environ.get("POLYMODAL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
COCO = SHARED / "coco-mini"
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason=f"{COCO} is absent")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(b"\xff\xd8")
    (folder / "hollow.jpg").write_bytes(b"")
    return folder


def imported(kind, src, out, **options):
    report = IMPORTERS[kind](src, out, **options)
    samples = list(open_source(out))
    assert len(samples) == report.written
    assert duplicate_ids(open_source(out)) == {}
    return samples, report


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_llava(photos, tmp_path):
    entries = [
        {"id": "1", "image": "a.jpg", "conversations": turns("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.")},
        {"id": "1", "image": ["a.jpg", "b.jpg"], "conversations": turns("Is <image> like\n<image>", "No.")},
        {"id": 3, "conversations": turns("Hello", "Hi.")},
        {"id": "no-file", "image": "gone.jpg", "conversations": turns("<image>", "x")},
        {"id": "hollow", "image": "hollow.jpg", "conversations": turns("<image>", "x")},
        {"id": "marks", "image": "a.jpg", "conversations": turns("What?", "x")},
        {"id": "answer", "conversations": turns("What?", "<image>")},
        {"id": "role", "conversations": [{"from": "robot", "value": "x"}]},
        {"id": "silent", "conversations": turns("x")},
        {"id": "blank", "conversations": turns("x", " ")},
        {"id": "none"},
        "text",
        {"id": "list", "image": [3], "conversations": turns("<image>", "x")},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    samples, report = imported("llava", tmp_path / "llava.json", tmp_path / "data.jsonl")
    assert [sample.id for sample in samples] == ["1", "1#2", "3"] and report.renamed == 1
    first = samples[0].messages
    assert [m.role for m in first] == ["user", "assistant", "user", "assistant"]
    assert isinstance(first[0].parts[0], Image) and first[0].parts[0].path == photos / "a.jpg"
    assert first[0].parts[1].text == "What is it?"
    second = samples[1].messages[0].parts
    assert [p.text if isinstance(p, Text) else p.path.name for p in second] == ["Is ", "a.jpg", " like", "b.jpg"]
    reasons = dict(report.skipped)
    assert len(report.skipped) + report.written == len(entries)
    for name, reason in [
        ("no-file", "gone.jpg is missing"),
        ("hollow", "empty"),
        ("marks", "0 <image> marks in human turns for 1 images"),
        ("answer", "outside the human turns"),
        ("role", "turn 0: expected 'from'"),
        ("silent", "no answer"),
        ("blank", "turn 1 is empty"),
        ("none", "no conversations"),
        ("entry 11", "no conversations"),
        ("list", "expected a file name"),
    ]:
        assert reason in reasons[name], name
    assert json.loads(json.dumps(report.to_data()))["written"] == 3
    assert "images/a.jpg" in (tmp_path / "data.jsonl").read_text()
    assert str(tmp_path) not in (tmp_path / "data.jsonl").read_text()


def coco(**more):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(["a", "b", "c", "gone"])]
    return {"images": [*images, {"id": 9}]} | more


def test_coco_captions(photos, tmp_path):
    data = coco(
        annotations=[
            {"id": 10, "image_id": 0, "caption": " A cat. "},
            {"id": 11, "image_id": 0, "caption": "Cats."},
            {"id": 12, "image_id": 1, "caption": ""},
            {"id": 13, "image_id": 3, "caption": "Lost."},
            {"id": 14, "image_id": 77, "caption": "Whose?"},
        ]
    )
    (tmp_path / "captions.json").write_text(json.dumps(data))
    samples, report = imported("coco-captions", tmp_path / "captions.json", tmp_path / "out" / "data.jsonl")
    assert [(s.id, s.views["text"].text, s.meta["image_id"]) for s in samples] == [
        ("0-10", "A cat.", 0), ("0-11", "Cats.", 0)
    ]  # fmt: skip
    assert {name for name, _ in report.skipped} == {
        "image 9", "gone.jpg", "annotation 14", "annotation 1-12", "c.jpg"
    }  # fmt: skip
    samples, _ = imported(
        "coco-captions", tmp_path / "captions.json", tmp_path / "c.jsonl", conversations=True, question="Say it."
    )
    assert samples[0].messages[0].parts[1].text == "Say it." and samples[0].messages[1].text == "A cat."
    assert samples[0].meta == {"image_id": 0}


def test_coco_instances(photos, tmp_path):
    data = coco(
        categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        annotations=[
            {"id": 20, "image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"id": 21, "image_id": 0, "category_id": 2, "bbox": [1, 2, 11, 9]},
            {"id": 22, "image_id": 0, "category_id": 2, "bbox": [1, 2, 1, 1]},
            {"id": 23, "image_id": 1, "category_id": 8, "bbox": [0, 0, 1, 1]},
            {"id": 24, "image_id": 2, "category_id": 1, "bbox": [0, 0]},
        ],
    )
    (tmp_path / "instances.json").write_text(json.dumps(data))
    samples, report = imported("coco-instances", tmp_path / "instances.json", tmp_path / "i.jsonl", images=photos)
    assert len(samples) == 1 and samples[0].label == "cat"
    assert dict(samples[0].meta) == {
        "objects": ["cat", "dog"], "counts": {"cat": 1, "dog": 2}, "image_id": 0,
        "boxes": [["cat", 0, 0, 10, 10], ["dog", 1, 2, 11, 9], ["dog", 1, 2, 1, 1]],
    }  # fmt: skip
    reasons = dict(report.skipped)
    assert "category 8" in reasons["annotation 23"] and "[x, y, width, height]" in reasons["annotation 24"]
    assert reasons["b.jpg"] == reasons["c.jpg"] == "has no usable box"
    samples, _ = imported("coco-instances", tmp_path / "instances.json", tmp_path / "j.jsonl", conversations=True)
    assert samples[0].messages[1].text == "cat, dog" and samples[0].label == "cat"


def test_folder(tmp_path):
    for name in ["cat/1.jpg", "cat/deep/2.png", "dog/1.jpg", "dog/note.md", "top.jpg", "dog/hollow.jpg"]:
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if "hollow" in name else b"x")
    samples, report = imported("folder", tmp_path / "src", tmp_path / "src" / "data.jsonl", caption="a photo of a {}")
    assert [(s.id, s.label, s.views["text"].text) for s in samples] == [
        ("cat/1.jpg", "cat", "a photo of a cat"),
        ("cat/deep/2.png", "cat", "a photo of a cat"),
        ("dog/1.jpg", "dog", "a photo of a dog"),
    ]
    assert dict(report.skipped) == {
        "dog/hollow.jpg": "the file is empty (0 bytes)",
        "dog/note.md": "the extension '.md' is no image",
        "top.jpg": "lies in no class folder",
    }
    with pytest.raises(ConfigError, match="unknown modality 'imag'; did you mean 'image'"):
        IMPORTERS["folder"](tmp_path, tmp_path / "x.jsonl", modality="imag")
    with pytest.raises(ConfigError, match="where the class stands"):
        IMPORTERS["folder"](tmp_path, tmp_path / "x.jsonl", caption="a photo")
    with pytest.raises(DataError, match="no such folder"):
        IMPORTERS["folder"](tmp_path / "gone", tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"nothing was imported, \d items were skipped \(.*is no audio"):
        IMPORTERS["folder"](tmp_path / "src", tmp_path / "x.jsonl", modality="audio")
    assert not (tmp_path / "x.jsonl").exists()


def test_folder_of_npy_clouds(tmp_path):
    (tmp_path / "src" / "ball").mkdir(parents=True)
    (tmp_path / "src" / "ball" / "1.npy").write_bytes(b"x")
    samples, _ = imported("folder", tmp_path / "src", tmp_path / "data.jsonl", modality="points")
    assert samples[0].views["points"].path.name == "1.npy"


def test_pairs(photos, tmp_path):
    rows = [
        "image,text,id,label,origin",
        'images/a.jpg,"Said ""hi"", then\nleft",one,greeting,web',
        "images/b.jpg,,two,,",
        "",
        "images/gone.jpg,x,three,,",
        "images/a.jpg,x",
        ",,empty,,",
        "images/c.jpg,last,one,,",
        "images/a.jpg,plain,,,",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    samples, report = imported("csv", tmp_path / "pairs.csv", tmp_path / "data.jsonl")
    assert [s.id for s in samples] == ["one", "two", "one#2", "row 7"] and report.renamed == 1
    assert samples[0].views["text"].text == 'Said "hi", then\nleft'
    assert samples[0].label == "greeting" and samples[0].meta == {"origin": "web"}
    assert list(samples[1].views) == ["image"] and samples[1].label is None
    reasons = dict(report.skipped)
    assert set(reasons) == {"row 3", "row 4", "row 5"}
    assert "gone.jpg is missing" in reasons["row 3"] and "2 fields, the header names 5" in reasons["row 4"]


def test_pairs_of_other_kinds_and_refusals(photos, tmp_path):
    (tmp_path / "p.tsv").write_text("audio\timage\na.jpg\tb.jpg\n")
    samples, _ = imported("csv", tmp_path / "p.tsv", tmp_path / "data.jsonl", root=photos)
    assert sorted(samples[0].views) == ["audio", "image"]
    (tmp_path / "bad.csv").write_text("picture,words\na,b\n")
    with pytest.raises(DataError, match=r"names the columns \['picture', 'words'\].*at least one of text, image"):
        IMPORTERS["csv"](tmp_path / "bad.csv", tmp_path / "x.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe4\n")
    with pytest.raises(DataError, match="not UTF-8"):
        IMPORTERS["csv"](tmp_path / "latin.csv", tmp_path / "x.jsonl")
    (tmp_path / "quote.csv").write_text('text\nfine\n"a"b\nmore\n')
    samples, report = imported("csv", tmp_path / "quote.csv", tmp_path / "q.jsonl")
    assert [s.views["text"].text for s in samples] == ["fine", "more"] and "row 2" in dict(report.skipped)


def test_sources_that_are_not_there(tmp_path):
    for name, importer in IMPORTERS.items():
        with pytest.raises(DataError, match=r"gone"):
            importer(tmp_path / "gone", tmp_path / f"{name}.jsonl")
    (tmp_path / "a.json").write_text("{}")
    for name in ("llava", "coco-captions", "coco-instances"):
        with pytest.raises(DataError, match="expected a list"):
            IMPORTERS[name](tmp_path / "a.json", tmp_path / "x.jsonl")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        IMPORTERS["llava"](tmp_path / "a.json", tmp_path / "x.jsonl")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="it holds nothing"):
        IMPORTERS["llava"](tmp_path / "a.json", tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="images: there is no folder"):
        IMPORTERS["llava"](tmp_path / "a.json", tmp_path / "x.jsonl", images=tmp_path / "gone")


@needs_coco
def test_real_coco(tmp_path):
    captions, report = imported("coco-captions", COCO / "captions.json", tmp_path / "c.jsonl")
    assert (len(captions), len(report.skipped)) == (400, 0)
    instances, report = imported("coco-instances", COCO / "instances.json", tmp_path / "i.jsonl")
    assert len(instances) + len([name for name, _ in report.skipped if name.endswith(".jpg")]) == 80
    boxes = sum(len(sample.meta["boxes"]) for sample in instances)
    assert boxes + len([name for name, _ in report.skipped if name.startswith("annotation")]) == 739
    assert all(sample.views["image"].path.is_file() for sample in (*captions, *instances))


def test_what_is_imported_is_never_written_over(photos, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("image,text\nimages/a.jpg,a cat\n")
    with pytest.raises(DataError, match=r"table.csv: is what is imported, expected another file to write"):
        IMPORTERS["csv"](table, tmp_path / "images" / ".." / "table.csv")
    assert table.read_text().startswith("image,text")
    with pytest.raises(DataError, match="images: is a folder, expected a file to write"):
        IMPORTERS["csv"](table, photos)
    assert not list(tmp_path.glob(".*part"))


def test_names_written_on_windows_are_found(photos, tmp_path):
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbfimage,text\r\nimages\\a.jpg,a cat\r\n")
    samples, _ = imported("csv", tmp_path / "table.csv", tmp_path / "csv.jsonl")
    entry = {"id": "1", "image": "images\\a.jpg", "conversations": turns("<image>", "A cat.")}
    (tmp_path / "llava.json").write_text(json.dumps([entry]))
    samples += imported("llava", tmp_path / "llava.json", tmp_path / "llava.jsonl", images=tmp_path)[0]
    coco = {"images": [{"id": 1, "file_name": "images\\a.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    samples += imported("coco-captions", tmp_path / "coco.json", tmp_path / "coco.jsonl", images=tmp_path)[0]
    assert [next(iter(sample.media())).path.resolve() for sample in samples] == [photos.resolve() / "a.jpg"] * 3


def test_delimiters(photos, tmp_path):
    (tmp_path / "table.csv").write_text("image;text\nimages/a.jpg;a cat\n")
    with pytest.raises(DataError, match=r"do its fields end at ';'\? Say so: delimiter=;"):
        IMPORTERS["csv"](tmp_path / "table.csv", tmp_path / "out.jsonl")
    assert imported("csv", tmp_path / "table.csv", tmp_path / "out.jsonl", delimiter=";")[1].written == 1
    with pytest.raises(ConfigError, match="delimiter: found ';;', expected one character, such as ; or the word tab"):
        IMPORTERS["csv"](tmp_path / "table.csv", tmp_path / "out.jsonl", delimiter=";;")
    (tmp_path / "tabs.csv").write_text("image\ttext\nimages/a.jpg\ta cat\n")
    with pytest.raises(DataError, match="delimiter=tab"):
        IMPORTERS["csv"](tmp_path / "tabs.csv", tmp_path / "out.jsonl")
    assert imported("csv", tmp_path / "tabs.csv", tmp_path / "out.jsonl", delimiter="tab")[1].written == 1


def test_a_box_without_an_area_and_a_hidden_file_are_left_out(photos, tmp_path):
    boxes = [
        {"id": id, "image_id": 1, "category_id": 1, "bbox": [1, 2, *size]} for id, size in ((1, [3, 4]), (2, [-3, 4]))
    ]
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    samples, report = imported("coco-instances", tmp_path / "coco.json", tmp_path / "out.jsonl")
    assert samples[0].meta["boxes"] == [["cat", 1, 2, 3, 4]]
    assert report.skipped == [
        ("annotation 2", "its bbox is [1, 2, -3, 4]; expected [x, y, width, height], width and height above 0")
    ]
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    for name in ("a.jpg", "._a.jpg"):
        (tmp_path / "classes" / "cat" / name).write_bytes(b"\xff\xd8")
    samples, report = imported("folder", tmp_path / "classes", tmp_path / "out.jsonl")
    assert [sample.id for sample in samples] == ["cat/a.jpg"]
    assert report.skipped == [("cat/._a.jpg", "is hidden: its name begins with a dot")]


def test_json_lines_where_one_value_is_expected(tmp_path):
    (tmp_path / "llava.json").write_text('{"id": 1}\n{"id": 2}\n')
    with pytest.raises(DataError, match="found several values, one a line"):
        IMPORTERS["llava"](tmp_path / "llava.json", tmp_path / "out.jsonl")
