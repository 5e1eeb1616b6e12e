"""What every file-reading modality shares: opening a source within the limits, and naming whatever a decoder raises."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

import numpy as np

from polymodal.core.errors import CorruptMediaError, LimitError, MediaError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Media, Part, check_file

M = TypeVar("M", bound=Media)


def expect_part(part: Part, kind: type[M]) -> M:
    """``part`` as the media part that a reader takes.

    Raises:
        UnsupportedMediaError: if it is another part.
    """
    if not isinstance(part, kind):
        name = getattr(part, "name", f"<{part.modality}>")
        raise UnsupportedMediaError(name, f"found a part of modality {part.modality!r}, expected {kind.modality!r}")
    return part


def is_encoded(part: Media) -> bool:
    """Whether the source is a file or its bytes, and not an array or another object."""
    return part.path is not None or isinstance(part.source, bytes | bytearray | memoryview)


@contextmanager
def named_errors(part: Media, doing: str) -> Iterator[None]:
    """Turn any failure of a third-party decoder into a media error that names the item.

    Args:
        part: the item.
        doing: what was attempted, for the message (``"decoding the JPEG"``).

    Raises:
        LimitError: if memory ran out.
        CorruptMediaError: for every other failure; media errors pass unchanged.
    """
    try:
        yield
    except MediaError:
        raise
    except MemoryError as error:
        raise LimitError(part.name, f"{doing} needs more memory than there is") from error
    except Exception as error:
        text = str(error).replace("\n", " ")[:200] or "no further detail"
        raise CorruptMediaError(
            part.name,
            f"{doing} failed; the file is damaged, truncated or not what it claims to be "
            f"({type(error).__name__}: {text})",
        ) from error


@contextmanager
def opened(part: Media, limits: Limits, takes: str) -> Iterator[tuple[BinaryIO, int]]:
    """The encoded bytes of a part as a binary file, and how many there are.

    Args:
        part: the item; a path or bytes.
        limits: ``file_bytes`` is applied before anything is read.
        takes: the sources that the modality takes, for the message.

    Raises:
        CorruptMediaError: if the file is missing, unreadable or empty.
        LimitError: if it is larger than ``file_bytes``.
        UnsupportedMediaError: if the source is of another type.
    """
    if not is_encoded(part):
        raise UnsupportedMediaError(part.name, f"found a {type(part.source).__name__}, expected {takes}")
    with named_errors(part, "opening the file"):
        if part.path is None:
            data = part.read_bytes(limits.file_bytes)
            file: BinaryIO = io.BytesIO(data)
            size = len(data)
        else:
            size = check_file(part.path, part.name, limits.file_bytes)
            file = part.path.open("rb")
    with file:
        yield file, size


def describe_head(head: bytes) -> str:
    """What the first bytes of an unknown file look like, for a message."""
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"<")):
        return "the file is text (a web page, XML or JSON?)"
    return f"the file starts with the bytes {head[:8].hex(' ')}"


def check_array(part: Media, expected: str) -> np.ndarray[Any, Any]:
    """The part's source as a non-empty array.

    Raises:
        CorruptMediaError: if it has no values.
        UnsupportedMediaError: if it is no array.
    """
    array = part.source
    if not isinstance(array, np.ndarray):
        raise UnsupportedMediaError(part.name, f"found a {type(array).__name__}, expected {expected}")
    if array.size == 0:
        raise CorruptMediaError(part.name, f"the array has no values (shape {array.shape}); expected {expected}")
    return array
