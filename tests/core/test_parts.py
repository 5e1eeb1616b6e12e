"""Parts: where bytes come from, what equal content is, and what a file may be."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.errors import (
    CorruptMediaError,
    LimitError,
    MediaError,
    MissingExtraError,
    SampleError,
    UnsupportedMediaError,
)
from polymodal.core.parts import (
    MODALITIES,
    PARTS,
    Audio,
    Image,
    Points,
    Sensor,
    Text,
    as_float_array,
    media_part,
    part_from_path,
)


def test_a_file_that_changes_has_another_key_and_one_that_settled_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = Image(path).content_key()
    path.write_bytes(b"abd")
    second = Image(path).content_key()
    assert second != first, "changed within a moment, at the same size"
    os.utime(path, ns=(10**18, 10**18))
    assert [Image(path).content_key(), Image(path).content_key()] == [second, second]
    path.write_bytes(b"abc")
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert Image(path).content_key() == first


def test_equal_content_has_an_equal_key_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "c").write_bytes(b"abd")
    keys = [Image(source).content_key() for source in (tmp_path / "a", str(tmp_path / "b"), b"abc", bytearray(b"abc"))]
    assert len(set(keys)) == 1 and len(keys[0]) == 32
    others = [
        Image(tmp_path / "c"),
        Points(b"abc"),
        Audio(b"abc"),
        Audio(b"abc", rate_hz=8000),
        Sensor(b"abc", channels=("x",)),
    ]
    assert len({keys[0], *(part.content_key() for part in others)}) == 6


def test_keys_of_arrays_tell_shape_and_type_apart() -> None:
    array = np.arange(6, dtype=np.uint8)
    keys = {Image(a).content_key() for a in (array, array.reshape(2, 3), array.astype(np.int8), array[::-1])}
    assert len(keys) == 4
    wide = np.arange(12, dtype=np.uint8).reshape(2, 6)
    assert Image(wide[:, ::2]).content_key() == Image(wide[:, ::2].copy()).content_key()


def test_names_are_paths_or_what_the_object_is() -> None:
    assert Image("a/b.png").name == Image(Path("a/b.png")).name == "a/b.png"
    assert Image(b"x").name == "<image bytes>" and Audio(np.zeros(3)).name == "<audio ndarray>"
    assert Image(b"x").path is None


def test_bytes_are_read_within_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert Image(tmp_path / "a").read_bytes(5) == Image(b"12345").read_bytes(5) == b"12345"
    for source in (tmp_path / "a", b"12345"):
        with pytest.raises(LimitError, match=r"5 bytes, the limit \(file_bytes\) is 4"):
            Image(source).read_bytes(4)
    with pytest.raises(UnsupportedMediaError, match="a ndarray has no encoded bytes; expected a path or bytes"):
        Image(np.zeros(3)).read_bytes(9)


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / "empty", "the file is empty"),
        ("a\0b", "null"),
    ):
        with pytest.raises(CorruptMediaError, match=reason):
            Image(path).read_bytes(10)
    for path in (tmp_path / "none", "a\0b", tmp_path):
        with pytest.raises(CorruptMediaError, match="cannot be read"):
            Image(path).content_key()
    with pytest.raises(CorruptMediaError, match=r"<image bytes>: the file is empty \(0 bytes\)"):
        Image(b"").read_bytes(10)


def test_extensions_name_modalities(tmp_path: Path) -> None:
    found = [part_from_path(f"x{ext}").modality for ext in (".PNG", ".wav", ".mp4", ".gif", ".ply", ".csv")]
    assert found == ["image", "audio", "video", "video", "points", "sensor"]
    (tmp_path / "a.txt").write_text("hi")
    part = part_from_path(tmp_path / "a.txt")
    assert isinstance(part, Text) and part.text == "hi"
    with pytest.raises(
        UnsupportedMediaError, match=r"x.npy: the extension '.npy' names no modality; .*points:cloud.npy"
    ):
        part_from_path("x.npy")


def test_text_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptMediaError, match=r"bad.txt: is not UTF-8 text"):
        part_from_path(tmp_path / "bad.txt")
    with pytest.raises(CorruptMediaError, match=r"none.txt: cannot be read: No such file"):
        part_from_path(tmp_path / "none.txt")


def test_media_parts_by_name() -> None:
    assert MODALITIES == tuple(PARTS) == ("text", "image", "audio", "video", "points", "sensor")
    assert media_part("audio", b"x", rate_hz=3).rate_hz == 3  # type: ignore[attr-defined]
    for name in ("txt", "text"):
        with pytest.raises(UnsupportedMediaError, match=f"unknown modality '{name}'"):
            media_part(name, b"x")


def test_floats_must_be_finite() -> None:
    found = as_float_array(np.arange(3), "x")
    assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"]
    with pytest.raises(CorruptMediaError, match=r"x: has no values \(shape \(0, 3\)\)"):
        as_float_array(np.zeros((0, 3)), "x")
    with pytest.raises(CorruptMediaError, match="x: 2 of 3 values are NaN or infinite"):
        as_float_array(np.array([1.0, np.nan, np.inf]), "x")


def test_errors_survive_a_worker_process() -> None:
    for error in (MediaError("a", "b"), LimitError("a", "b"), SampleError("a", "b")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)


def test_a_missing_extra_says_what_to_install() -> None:
    error = MissingExtraError("laspy", "points", "reading LAS")
    assert str(error) == (
        "reading LAS needs the package 'laspy', which is not installed; "
        "install it with: pip install 'polymodal[points]'"
    )
    assert isinstance(error, ImportError) and error.extra == "points"
