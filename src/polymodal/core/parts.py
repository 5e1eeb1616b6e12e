"""Parts: one piece of content each, with its source.

A media part remembers where its bytes come from and reads nothing until a reader asks.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from polymodal.core.config import unknown
from polymodal.core.errors import CorruptMediaError, LimitError, UnsupportedMediaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SETTLED_NS = 2 * 10**9
Source = Any
"""A path (``str`` or ``os.PathLike``), ``bytes``, a numpy array, or (images) a ``PIL.Image.Image``."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Base of every part. ``modality`` is the name that streams, tables and JSON use."""

    modality: ClassVar[str] = ""


@dataclass(frozen=True, slots=True, eq=False)
class Text(Part):
    """Plain text. Control strings inside it are text: they never become control tokens."""

    text: str
    modality: ClassVar[str] = "text"


@dataclass(frozen=True, slots=True, eq=False)
class Media(Part):
    """A part that a reader decodes.

    Args:
        source: path, bytes, array or (images) PIL image; each reader states the arrays it takes.
    """

    source: Source

    @property
    def name(self) -> str:
        """What a message calls this item: its path, or what kind of in-memory object it is."""
        if isinstance(self.source, str | os.PathLike):
            return os.fspath(self.source)
        return f"<{self.modality} {type(self.source).__name__}>"

    @property
    def path(self) -> Path | None:
        """The file, where the source is one."""
        source = self.source
        if isinstance(source, Path):
            return source
        return Path(source) if isinstance(source, str | os.PathLike) else None

    def read_bytes(self, max_bytes: int) -> bytes:
        """The encoded bytes of a path or bytes source.

        Raises:
            CorruptMediaError: if the file is missing, unreadable or empty.
            LimitError: if there are more than ``max_bytes``.
            UnsupportedMediaError: if the source is an array or another object without encoded bytes.
        """
        if isinstance(self.source, bytes | bytearray | memoryview):
            data = bytes(self.source)
        elif (path := self.path) is not None:
            check_file(path, self.name, max_bytes)
            data = path.read_bytes()
        else:
            raise UnsupportedMediaError(
                self.name, f"a {type(self.source).__name__} has no encoded bytes; expected a path or bytes"
            )
        if not data:
            raise CorruptMediaError(self.name, "the file is empty (0 bytes)")
        if len(data) > max_bytes:
            raise LimitError(self.name, f"{len(data):,} bytes, the limit (file_bytes) is {max_bytes:,}")
        return data

    def content_key(self) -> str:
        """Hex digest (128 bits) of the content: equal content has an equal key, wherever it lies."""
        if (path := self.path) is not None:
            try:
                digest = _file_digest(self.modality, path)
            except (OSError, ValueError) as error:
                raise CorruptMediaError(self.name, f"cannot be read: {_reason(error)}") from None
        elif isinstance(self.source, bytes | bytearray | memoryview):
            digest = _new_digest(self.modality)
            digest.update(self.source)
        else:
            digest = _new_digest(self.modality)
            array = np.ascontiguousarray(self.source)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        digest.update(repr(self.details()).encode())
        return digest.hexdigest()

    def details(self) -> tuple[object, ...]:
        """What besides the bytes decides the content (a rate, channel names)."""
        return ()


def _new_digest(modality: str) -> hashlib.blake2b:
    return hashlib.blake2b(modality.encode(), digest_size=16)


def _file_digest(modality: str, path: Path) -> hashlib.blake2b:
    """The digest of a modality and a file, for the caller to go on with; training meets each file many times."""
    state = settled_state(path)
    return _fresh_digest(modality, path) if state is None else _settled_digest(modality, path, state).copy()


FileState = tuple[int, int, int]
"""Inode, bytes and time of the last change of a file."""


def settled_state(path: Path) -> FileState | None:
    """What changes whenever the file's content does; None of a file so new that this cannot be told.

    Raises:
        OSError: if there is no such file.
        ValueError: if the path holds a zero character.
    """
    status = path.stat()
    # The clock of a file system may be coarse: what was changed a moment ago may change again without a trace.
    if time.time_ns() - status.st_mtime_ns < _SETTLED_NS:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1 << 16)
def _settled_digest(modality: str, path: Path, _state: FileState) -> hashlib.blake2b:
    return _fresh_digest(modality, path)


def _fresh_digest(modality: str, path: Path) -> hashlib.blake2b:
    digest = _new_digest(modality)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


@dataclass(frozen=True, slots=True, eq=False)
class Image(Media):
    """A still picture: JPEG, PNG, WebP, GIF (first frame); uint8 ``[H, W]`` or ``[H, W, 3|4]``; or PIL."""

    modality: ClassVar[str] = "image"


@dataclass(frozen=True, slots=True, eq=False)
class Audio(Media):
    """A recording: WAV, FLAC, OGG, MP3, or the audio track of MP4/WebM; or float ``[T]`` / ``[T, C]`` in -1..1.

    Args:
        source: path, bytes or array.
        rate_hz: sampling rate; required for arrays, read from the header otherwise.
    """

    rate_hz: int | None = None
    modality: ClassVar[str] = "audio"

    def details(self) -> tuple[object, ...]:
        """The rate."""
        return (self.rate_hz,)


@dataclass(frozen=True, slots=True, eq=False)
class Video(Media):
    """Moving pictures: MP4, WebM, GIF; or uint8 ``[F, H, W, 3]`` frames.

    Args:
        source: path, bytes or array.
        fps: frames per second; required for arrays, read from the header otherwise.
    """

    fps: float | None = None
    modality: ClassVar[str] = "video"

    def details(self) -> tuple[object, ...]:
        """The rate of frames."""
        return (self.fps,)


@dataclass(frozen=True, slots=True, eq=False)
class Points(Media):
    """A 3-D point cloud: PLY, OBJ, LAS, XYZ, NPY; or float ``[N, 3]`` xyz / ``[N, 6]`` xyz + rgb in 0..1."""

    modality: ClassVar[str] = "points"


@dataclass(frozen=True, slots=True, eq=False)
class Sensor(Media):
    """A multi-channel time series: CSV, Parquet, NPY; or float ``[T, C]``.

    Args:
        source: path, bytes or array.
        rate_hz: sampling rate; required unless the file has a time column or names its rate.
        channels: channel names in column order; read from the header where there is one.
    """

    rate_hz: float | None = None
    channels: tuple[str, ...] | None = None
    modality: ClassVar[str] = "sensor"

    def details(self) -> tuple[object, ...]:
        """The rate and the names of the channels."""
        return (self.rate_hz, self.channels)


PARTS: dict[str, type[Part]] = {part.modality: part for part in (Text, Image, Audio, Video, Points, Sensor)}
"""Every kind of part by its modality name."""

MODALITIES = tuple(PARTS)

_EXTENSIONS = {
    "image": ".jpg .jpeg .png .webp .bmp .tif .tiff",
    "audio": ".wav .flac .ogg .oga .opus .mp3",
    "video": ".mp4 .webm .mkv .mov .avi .gif",
    "points": ".ply .obj .las .laz .xyz",
    "sensor": ".csv .parquet",
    "text": ".txt .md",
}
MODALITY_OF_EXTENSION = {ext: modality for modality, exts in _EXTENSIONS.items() for ext in exts.split()}


def media_part(modality: str, source: Source, **details: Any) -> Media:
    """The media part of ``modality``.

    Raises:
        UnsupportedMediaError: if ``modality`` names no media part.
    """
    kind = PARTS.get(modality)
    if kind is None or not issubclass(kind, Media):
        raise UnsupportedMediaError(str(source)[:80], unknown("modality", modality, MODALITIES[1:]))
    return kind(source, **details)


def part_from_path(path: str | os.PathLike[str]) -> Part:
    """The part that a file's extension stands for (``.npy`` is ambiguous and must be named by modality).

    Raises:
        UnsupportedMediaError: if the extension is not known.
        CorruptMediaError: if a text file cannot be read as UTF-8.
    """
    path = Path(path)
    modality = MODALITY_OF_EXTENSION.get(path.suffix.lower())
    if modality is None:
        known = ", ".join(sorted(MODALITY_OF_EXTENSION))
        raise UnsupportedMediaError(
            str(path),
            f"the extension {path.suffix!r} names no modality; known: {known}. "
            "Say which one it is, as in points:cloud.npy",
        )
    if modality == "text":
        try:
            return Text(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise CorruptMediaError(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except (OSError, ValueError) as error:
            raise CorruptMediaError(str(path), f"cannot be read: {_reason(error)}") from None
    return media_part(modality, path)


def check_file(path: Path, name: str, max_bytes: int) -> int:
    """The size of a readable regular file, checked against the limit.

    Raises:
        CorruptMediaError: if it is missing, not a file, unreadable or empty.
        LimitError: if it is larger than ``max_bytes``.
    """
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise CorruptMediaError(name, f"cannot be read: {_reason(error)}") from None
    if not path.is_file():
        raise CorruptMediaError(name, "is not a regular file")
    if size == 0:
        raise CorruptMediaError(name, "the file is empty (0 bytes)")
    if size > max_bytes:
        raise LimitError(name, f"{size:,} bytes, the limit (file_bytes) is {max_bytes:,}")
    return size


def _reason(error: OSError | ValueError) -> str:
    """Why a path cannot be read; a path that holds a zero character is a ValueError and not an OSError."""
    return getattr(error, "strerror", None) or str(error)


def as_float_array(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """``array`` as finite float32.

    Raises:
        CorruptMediaError: if it is empty or holds NaN or infinity.
    """
    if array.size == 0:
        raise CorruptMediaError(name, f"has no values (shape {array.shape})")
    result = np.ascontiguousarray(array, dtype=np.float32)
    bad = int(result.size - np.count_nonzero(np.isfinite(result)))
    if bad:
        raise CorruptMediaError(name, f"{bad:,} of {result.size:,} values are NaN or infinite; expected finite numbers")
    return result
