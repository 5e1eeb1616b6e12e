import json
from pathlib import Path

import pytest
from tiny_runs import make_data, make_run
from typer.testing import CliRunner

from polymodal.apps import corpora
from polymodal.apps.cli import app
from polymodal.core.errors import ConfigError, DataError
from polymodal.core.parts import MODALITIES
from polymodal.data.sources import open_source


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    corpora.make("scenes", folder, ["num_train=3", "num_val=2", "num_novel=1", "seed=7"], as_json=False)
    return folder


def test_make_scenes_takes_its_options(scenes):
    summary = json.loads((scenes / "scenes.json").read_text(encoding="utf-8"))
    assert summary["seed"] == 7 and summary["scenes"] == {"train": 3, "val": 2, "novel": 1}


def test_make_again_leaves_the_corpus_and_prints_json(scenes, capsys):
    before = (scenes / "scenes.json").stat().st_mtime_ns
    corpora.make("scenes", scenes, ["num_train=3", "num_val=2", "num_novel=1", "seed=7"], as_json=True)
    assert json.loads(capsys.readouterr().out)["out"] == str(scenes)
    assert (scenes / "scenes.json").stat().st_mtime_ns == before


def test_make_says_what_there_is(tmp_path, capsys):
    corpora.make("scenes", tmp_path, ["num_train=1", "num_val=1", "num_novel=0"], as_json=False)
    said = capsys.readouterr().out
    assert "train" in said and "polymodal data inspect" in said


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ("scene", [], "unknown corpus 'scene'; did you mean 'scenes'"),
        ("scenes", ["num_tran=3"], "corpus scenes: unknown option 'num_tran'; did you mean 'num_train'"),
        ("scenes", ["num_train=many"], "corpus scenes: num_train: found 'many', expected a whole number"),
        ("scenes", ["num_train=true"], "num_train: found True, expected a value like 4000"),
        ("scenes", ["num_train"], "expected key.sub=value"),
        ("digits", [], "corpus digits: needs audio=..."),
        ("scenes", ["out=x"], "unknown option 'out'"),
    ],
)
def test_wrong_options_are_explained(corpus, options, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        corpora.make(corpus, tmp_path / "out", options, as_json=False)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_import_writes_samples_and_lists_what_was_left_out(tmp_path, scenes, capsys):
    pictures = scenes / "train" / "media" / "image"
    table = tmp_path / "pairs.csv"
    table.write_text(f"image,text\n{pictures}/000000.png,one\nnone.png,two\n", encoding="utf-8")
    corpora.bring("csv", table, tmp_path / "out.jsonl", [], as_json=False)
    said = capsys.readouterr().out
    assert "wrote 1 samples" in said and "1 items were left out" in said and "row 2" in said
    assert len(open_source(tmp_path / "out.jsonl")) == 1
    corpora.bring("csv", table, tmp_path / "out.jsonl", [], as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["written"] == 1 and data["skipped"][0][0] == "row 2"


def test_import_takes_the_options_of_its_format(tmp_path, scenes):
    for name in ("yes", "no"):
        (tmp_path / "src" / name).mkdir(parents=True)
        picture = (scenes / "train" / "media" / "image" / "000000.png").read_bytes()
        (tmp_path / "src" / name / "1.png").write_bytes(picture)
    corpora.bring("folder", tmp_path / "src", tmp_path / "out.jsonl", ["caption=a {} here"], as_json=True)
    assert {sample.views["text"].text for sample in map(open_source(tmp_path / "out.jsonl").__getitem__, (0, 1))} == {
        "a yes here", "a no here",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("coco", [], "unknown format 'coco'"),
        ("llava", ["image=x"], "format llava: unknown option 'image'; did you mean 'images'"),
    ],
)
def test_wrong_formats_are_explained(format, options, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        corpora.bring(format, tmp_path, tmp_path / "out.jsonl", options, as_json=False)
    assert message in str(caught.value)


def test_inspect_counts_and_measures(scenes, capsys):
    corpora.inspect(scenes / "train" / "views.jsonl", decode=True, as_json=False)
    said = capsys.readouterr().out
    assert "15 samples" in said and "view sets" in said and "every file decoded" in said
    for modality in MODALITIES:
        assert modality in said
    assert "image width_px" in said and "characters, view" in said


def test_inspect_names_what_is_broken(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    lines = [
        {"id": "a", "views": {"image": "bad.png"}},
        {"id": "b", "views": {"image": "gone.png"}},
        {"id": "b", "views": {"text": "[red] brackets stay"}},
        {"id": "c"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    corpora.inspect(data, decode=False, as_json=False)
    said = capsys.readouterr().out
    for found in ("malformed: 1", "missing: 1", "broken: 1", "ids used twice: 1", "gone.png", "bad.png"):
        assert found in said, found
    assert "nothing malformed" not in said
    corpora.inspect(data, decode=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["is_clean"] is False


def test_inspect_of_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError):
        corpora.inspect(tmp_path / "none.jsonl", decode=False, as_json=False)


def test_capfilt_writes_and_judges_with_runs(tmp_path, capsys):
    data = make_data(tmp_path / "scenes")
    run = make_run(tmp_path / "run", data)
    lines = [json.loads(line) for line in (data / "train/views.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = [line for line in lines if "image" in line["views"]][:4]
    (data / "train/pictures.jsonl").write_text("\n".join(map(json.dumps, pictures)) + "\n", encoding="utf-8")
    out, arguments = tmp_path / "out.jsonl", ["data", "capfilt", str(data / "train/pictures.jsonl")]
    options = ["--filter", str(run), "--captioner", str(run), "--threshold", "-1", "--json", "--device", "cpu"]
    options += ["--temperature", "1", "--top-p", "0.9", "--seed", "1", "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, [*arguments, str(out), *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["judged_by"] == "similarity" and report["threshold"] == -1 and report["samples"] == 4
    assert report["kept"]["original"] == 4
    kept = open_source(out)
    assert {kept[i].meta["caption"] for i in range(len(kept))} <= {"original", "synthetic"}
    elsewhere = CliRunner().invoke(
        app, [*arguments, str(tmp_path / "b.jsonl"), "--filter", str(run), "--device", "tpu"]
    )
    assert isinstance(elsewhere.exception, ConfigError) and "device: Input should be" in str(elsewhere.exception)
    again = CliRunner().invoke(app, [*arguments, str(out), "--filter", str(run)])
    assert again.exit_code != 0
    told = CliRunner().invoke(app, [*arguments, str(tmp_path / "b.jsonl"), "--filter", str(run), "--threshold", "-1"])
    assert told.exit_code == 0 and "kept from a similarity of -1.000 on" in told.output
