import gzip
import json
import os
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from polymodal.core.errors import DataError, MissingExtraError
from polymodal.core.samples import sample_from_json
from polymodal.data.digits import FILES, WORDS, make_digits
from polymodal.data.idx import read_idx

SHARED = Path(os.environ.get("POLYMODAL_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    for digit in range(10):
        for speaker in ("ann", "bob", "cy"):
            for k in range(5):
                soundfile.write(folder / f"{digit}_{speaker}_{k}.wav", np.full(80, 0.1), 8000)
    return folder


@pytest.fixture(scope="module")
def handwriting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handwriting")
    rng = np.random.default_rng(0)
    (folder / "images-idx3-ubyte.gz").write_bytes(
        gzip.compress(idx(rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)))
    )
    (folder / "labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((np.arange(60) % 10).astype(np.uint8))))
    return folder


def load(out):
    return {
        name: [
            sample_from_json(json.loads(line), out, "?") for line in (out / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in FILES
    }


def speaker(sample):
    return sample.views["audio"].path.name.split("_")[1]


def check_split(out, unseen):
    """What every digits folder must hold."""
    sets = load(out)
    assert all(set(s.views) == {"image", "text"} for s in sets["train_image_text"])
    assert all(set(s.views) == {"audio", "text"} for s in sets["train_speech_text"])
    for name in ("eval_known", "eval_unseen"):
        assert all(set(s.views) == {"image", "audio", "text"} for s in sets[name])
        assert {s.label for s in sets[name]} == set(WORDS)
    trained = {s.views["image"].path for s in sets["train_image_text"]} | {
        s.views["audio"].path for s in sets["train_speech_text"]
    }
    for name in ("eval_known", "eval_unseen"):
        assert not trained & {part.path for s in sets[name] for part in s.media()}
    assert {speaker(s) for s in sets["eval_unseen"]} == {unseen}
    assert unseen not in {speaker(s) for name in ("train_speech_text", "eval_known") for s in sets[name]}
    for samples in sets.values():
        for s in samples:
            assert s.label == s.views["text"].text
            assert all(part.path.exists() for part in s.media())
            if "audio" in s.views:
                assert s.views["audio"].path.name[0] == str(WORDS.index(s.label))
    return sets


def test_idx_digits_are_split_without_overlap(tmp_path, speech, handwriting):
    seen = []
    summary = make_digits(tmp_path / "d", speech, handwriting, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(60, 60)] and summary["labels"] == list(WORDS) and summary["unseen_speaker"] == "cy"
    sets = check_split(tmp_path / "d", "cy")
    assert summary["counts"] == {name: len(samples) for name, samples in sets.items()}
    assert summary["counts"] == {"train_image_text": 50, "train_speech_text": 80, "eval_known": 20, "eval_unseen": 50}
    images = read_idx(handwriting / "images-idx3-ubyte.gz", 3)
    for s in sets["train_image_text"]:
        index = int(s.views["image"].path.stem)
        assert WORDS[index % 10] == s.label
        assert np.array_equal(np.asarray(Image.open(s.views["image"].path)), images[index])


def test_the_split_follows_the_seed(tmp_path, speech, handwriting):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_digits(tmp_path / name, speech, handwriting, seed=seed, unseen_speaker="ann")
    text = {name: [(tmp_path / name / f"{file}.jsonl").read_text() for file in FILES] for name in "abc"}
    assert text["a"] == text["b"] != text["c"]
    check_split(tmp_path / "a", "ann")


def test_bundled_handwriting_is_the_default(tmp_path, speech):
    pytest.importorskip("sklearn")
    summary = make_digits(tmp_path / "d", speech)
    assert summary["counts"]["train_image_text"] > 1400
    samples = check_split(tmp_path / "d", "cy")["train_image_text"]
    assert min(Counter(s.label for s in samples).values()) > 130
    pixels = np.asarray(Image.open(samples[0].views["image"].path))
    assert pixels.shape == (28, 28) and pixels.dtype == np.uint8 and pixels.max() > 200


def test_without_scikit_learn_the_install_line_is_given(tmp_path, speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"the bundled handwriting needs .* pip install 'polymodal\[data\]'"):
        make_digits(tmp_path / "d", speech)


def test_a_finished_folder_is_kept_an_interrupted_one_made_again_and_a_foreign_one_refused(
    tmp_path, speech, handwriting
):
    out = tmp_path / "d"
    summary = make_digits(out, speech, handwriting)
    stamp = (out / "digits.json").stat().st_mtime_ns
    assert make_digits(out, speech, handwriting) == summary
    assert (out / "digits.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"other settings; choose another folder"):
        make_digits(out, speech, handwriting, seed=1)
    (out / "digits.json").write_text("{")
    with pytest.raises(DataError, match=r"other settings"):
        make_digits(out, speech, handwriting)
    (out / "digits.json").unlink()
    (out / "eval_known.jsonl").write_text("half a li")
    assert make_digits(out, speech, handwriting) == summary
    check_split(out, "cy")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"'thesis.txt'.*choose an empty folder"):
        make_digits(tmp_path / "home", speech, handwriting)


def test_bad_speech_folders_are_named(tmp_path, speech, handwriting):
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected .*{digit}_{speaker}_{index}.wav"):
        make_digits(tmp_path / "d", tmp_path / "nowhere", handwriting)
    with pytest.raises(DataError, match=r"unknown speaker 'an'; did you mean 'ann'"):
        make_digits(tmp_path / "d", speech, handwriting, unseen_speaker="an")
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "0_ann_0.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"found no recording of 'one', expected all ten digits"):
        make_digits(tmp_path / "d", folder, handwriting)
    for digit in range(10):
        (folder / f"{digit}_ann_0.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"found one speaker \(ann\), expected at least two"):
        make_digits(tmp_path / "d", folder, handwriting)
    (folder / "hello.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"hello.wav: found this name, expected {digit}_{speaker}_{index}.wav"):
        make_digits(tmp_path / "d", folder, handwriting)
    assert not (tmp_path / "d").exists()


def test_bad_handwriting_folders_are_named(tmp_path, speech):
    folder = tmp_path / "h"
    folder.mkdir()
    with pytest.raises(DataError, match=r"found none, expected one file named images-idx3-ubyte"):
        make_digits(tmp_path / "d", speech, folder)
    (folder / "images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 4), dtype=np.uint8)))
    (folder / "labels-idx1-ubyte").write_bytes(idx(np.zeros(2, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"found 3 images and 2 labels, expected as many"):
        make_digits(tmp_path / "d", speech, folder)
    (folder / "labels-idx1-ubyte").write_bytes(idx(np.array([0, 1, 12], dtype=np.uint8)))
    with pytest.raises(DataError, match=r"found the label 12, expected digits 0 to 9"):
        make_digits(tmp_path / "d", speech, folder)
    (folder / "labels-idx1-ubyte").write_bytes(idx(np.zeros(3, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"found no handwritten 'one', expected all ten digits"):
        make_digits(tmp_path / "d", speech, folder)


GOOD = idx(np.arange(48, dtype=np.uint8).reshape(3, 4, 4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (idx(np.zeros(4, dtype=np.uint8)), "found magic number '00000801', expected '00000803'"),
        (b"", "found magic number '', expected '00000803'"),
        (GOOD[:10], "found a header of 10 bytes, expected 16; the file is truncated"),
        (GOOD[:-5], "found 43 bytes of data, expected 48 for shape .*; the file is truncated"),
        (GOOD + b"!", "found 49 bytes of data, expected 48 .* followed by something else"),
        (GOOD[:4] + struct.pack(">3I", 2**31, 2**31, 9), "expected 1 to 1,073,741,824 values"),
        (gzip.compress(GOOD, mtime=0)[:-12], "not a whole gzip file"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 30, "not a whole gzip file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, data, message):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(path, 3)


def test_idx_reads_plain_and_compressed_files(tmp_path):
    (tmp_path / "plain").write_bytes(GOOD)
    (tmp_path / "packed").write_bytes(gzip.compress(GOOD, mtime=0))
    for name in ("plain", "packed"):
        assert np.array_equal(read_idx(tmp_path / name, 3).ravel(), np.arange(48))
    with pytest.raises(DataError, match=r"absent: cannot be read: No such file"):
        read_idx(tmp_path / "absent", 3)


@pytest.mark.skipif(not (SHARED / "spoken-digits").is_dir(), reason="needs the real recordings (POLYMODAL_SHARED_DATA)")
def test_real_recordings_and_handwriting(tmp_path):
    summary = make_digits(tmp_path / "d", SHARED / "spoken-digits", SHARED / "handwritten-digits")
    assert summary["unseen_speaker"] == "nicolas"
    assert summary["counts"]["train_speech_text"] == 1200 and summary["counts"]["eval_known"] == 300
    assert summary["counts"]["eval_unseen"] == 500 and summary["counts"]["train_image_text"] > 6000
