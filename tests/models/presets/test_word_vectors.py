"""Word vectors: every file format gives the same table, and the table is a text encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import polymodal as pm
from polymodal.core.errors import CheckpointError
from polymodal.models.presets.word_vectors import read_word_vectors, word_vector_folder

WORDS = ["red", "cube", "caf\u00e9", "the"]
VECTORS = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def text_file(folder: Path, header: bool = True) -> Path:
    lines = [f"{len(WORDS)} {VECTORS.shape[1]}"] if header else []
    lines += [" ".join([word, *(repr(float(x)) for x in row)]) for word, row in zip(WORDS, VECTORS, strict=True)]
    path = folder / "vectors.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def binary_file(folder: Path, newline: bytes = b"\n") -> Path:
    rows = [word.encode() + b" " + row.tobytes() for word, row in zip(WORDS, VECTORS, strict=True)]
    path = folder / "vectors.bin"
    path.write_bytes(b"4 6\n" + newline.join(rows))
    return path


def test_every_format_gives_the_same_table(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", VECTORS.astype(np.float64))
    (tmp_path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    found = [
        read_word_vectors(text_file(tmp_path)),
        read_word_vectors(text_file(tmp_path, header=False)),
        read_word_vectors(binary_file(tmp_path)),
        read_word_vectors(binary_file(tmp_path, newline=b"")),
        read_word_vectors(tmp_path / "vectors.npy", tmp_path / "words.txt"),
    ]
    for words, vectors in found:
        assert words == WORDS
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, VECTORS)


def test_the_table_is_a_text_encoder(tmp_path: Path) -> None:
    folder = word_vector_folder(text_file(tmp_path), tmp_path / "out", lowercase=True)
    model = pm.load(folder)
    whole, unknown = model.features(["The red cube", "red nonsense cube"])
    np.testing.assert_array_equal(whole.features[0], VECTORS[[3, 0, 1]])
    np.testing.assert_allclose(whole.pooled[0], VECTORS[[3, 0, 1]].mean(0), rtol=1e-6)
    # A word without a vector does not turn the mean, it only shortens it.
    np.testing.assert_allclose(unknown.pooled[0], VECTORS[[0, 1]].mean(0) * 2 / 3, rtol=1e-6)
    assert model.export(tmp_path / "back") == "word_vectors"
    again = pm.load(tmp_path / "back").features(["The red cube"])[0]
    np.testing.assert_array_equal(again.features, whole.features)
    with pytest.raises(CheckpointError, match="is not empty; choose a new folder"):
        word_vector_folder(text_file(tmp_path), folder)


def test_damaged_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    for content, message in (
        ("3 2\na 1 2\n", "found 1 words, the first line states 3"),
        ("a 1 2\nb 1\n", "line 2 holds 1 numbers, the first 2"),
        ("a 1 x\n", "could not convert"),
        ("a 1 2\na 3 4\n", "found 2 words, expected at least one, each once"),
        ("a 1 nan\n", "values that are not finite"),
        ("", "found 0 words"),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_word_vectors(path)
    whole = binary_file(tmp_path).read_bytes()
    path = tmp_path / "bad.bin"
    for data, message in (
        (whole[:-3], "it ends within vector 4 of 4|cannot hold"),
        (b"9999999 300\n", "cannot hold 9999999 vectors of width 300"),
        (whole[:110], "it ends within"),
        (b"nonsense", "not enough values|invalid literal"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_word_vectors(path)
    np.save(tmp_path / "v.npy", VECTORS)
    (tmp_path / "w.txt").write_text("a\nb\n")
    with pytest.raises(CheckpointError, match=r"found vectors of shape \(4, 6\) for 2 words"):
        read_word_vectors(tmp_path / "v.npy", tmp_path / "w.txt")
    with pytest.raises(CheckpointError, match=r"an .npy file holds no words"):
        read_word_vectors(tmp_path / "v.npy")
