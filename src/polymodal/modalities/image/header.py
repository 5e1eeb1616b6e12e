"""What an image file says about itself: size, format and orientation, without decoding a pixel."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import PIL.Image

from polymodal.core.errors import CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import FileState, Image, settled_state
from polymodal.modalities.decoding import check_array, describe_head, is_encoded, named_errors, opened
from polymodal.modalities.image.complete import check_complete

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TAKES = (
    "a path or bytes (JPEG, PNG, WebP, GIF, BMP, TIFF), a uint8 array [H, W], [H, W, 3] or [H, W, 4], or a PIL image"
)
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size and kind of an image.

    Args:
        width_px: width as seen, after the EXIF orientation.
        height_px: height as seen.
        format: ``JPEG``, ``PNG``, ..., ``array`` or ``PIL``.
        mode: Pillow's pixel mode (``RGB``, ``CMYK``, ``I;16``, ...).
        orientation: EXIF orientation 1..8; 1 where there is none.
    """

    width_px: int
    height_px: int
    format: str
    mode: str
    orientation: int = 1

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height as seen."""
        return self.width_px, self.height_px


def probe_image(part: Image, limits: Limits) -> ImageHeader:
    """Read the header.

    Raises:
        CorruptMediaError: if it is damaged or empty.
        LimitError: if the file, the area or a side is above the limits.
        UnsupportedMediaError: if the source or the format is none that is read.
    """
    if isinstance(part.source, PIL.Image.Image):
        return header_of(part, part.source, limits)
    if is_encoded(part):
        return settled_header(part, limits) or _read_header(part, limits)
    array = check_array(part, TAKES)
    if array.dtype != np.uint8:
        hint = "; multiply by 255 and cast" if array.dtype.kind == "f" else ""
        raise UnsupportedMediaError(part.name, f"found an array of {array.dtype}, expected uint8 in 0..255{hint}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UnsupportedMediaError(
            part.name, f"found an array of shape {array.shape}, expected [H, W], [H, W, 3] or [H, W, 4] (channels last)"
        )
    mode = "L" if array.ndim == 2 else ("RGB" if array.shape[2] == 3 else "RGBA")
    return _within(part, ImageHeader(array.shape[1], array.shape[0], "array", mode), limits)


def settled_header(part: Image, limits: Limits) -> ImageHeader | None:
    """The header of a file, read once as long as the file does not change; None of a new file, or of no file.

    Planning, decoding and every later epoch ask for it, and reading it takes longer than asking whether the file is
    still the same.

    Raises:
        MediaError: as :func:`probe_image` does.
    """
    path = part.path
    if path is None:
        return None
    try:
        state = settled_state(path)
    except (OSError, ValueError):
        return None  # whoever opens the file says what is wrong with it
    return None if state is None else _header_of_file(part.name, state, limits)


@functools.lru_cache(maxsize=1 << 16)
def _header_of_file(name: str, _state: FileState, limits: Limits) -> ImageHeader:
    return _read_header(Image(name), limits)


def _read_header(part: Image, limits: Limits) -> ImageHeader:
    with opened_image(part, limits) as image:
        return header_of(part, image, limits)


@contextmanager
def opened_image(part: Image, limits: Limits) -> Iterator[PIL.Image.Image]:
    """The encoded image, opened lazily by Pillow: its header is read, its pixels are not.

    Raises:
        CorruptMediaError: if the header is damaged, or a PNG or GIF ends before its end mark.
        LimitError: if Pillow itself calls it a decompression bomb.
        UnsupportedMediaError: if the format is none that is read.
    """
    with opened(part, limits, TAKES) as (file, _):
        head = file.read(64)
        file.seek(0)
        check_complete(part, file, limits)
        with named_errors(part, "reading the image header"):
            try:
                image = PIL.Image.open(file, formats=FORMATS)
            except PIL.Image.DecompressionBombError as error:
                raise LimitError(part.name, f"its header claims too many pixels: {error}") from error
            except PIL.UnidentifiedImageError as error:
                raise UnsupportedMediaError(
                    part.name, f"is no image that can be read: {describe_head(head)}; expected {', '.join(FORMATS)}"
                ) from error
        with image:
            yield image


def header_of(part: Image, image: PIL.Image.Image, limits: Limits) -> ImageHeader:
    """The header of an opened image, within the limits.

    Raises:
        LimitError: if it claims more than the limits allow.
    """
    orientation = _orientation(image)
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    header = ImageHeader(width, height, image.format or "PIL", image.mode, orientation)
    return _within(part, header, limits)


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation 1..8; damaged EXIF counts as none, since the pixels are whole.

    A TIFF is turned by Pillow when it is loaded, so that its orientation is 1 here.
    """
    if image.format == "TIFF":
        return 1
    try:
        # the base class's method: PNG's own one decodes the pixels to look for EXIF that stands behind them
        value = PIL.Image.Image.getexif(image).get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _within(part: Image, header: ImageHeader, limits: Limits) -> ImageHeader:
    width, height = header.size_px
    if width < 1 or height < 1:
        raise CorruptMediaError(part.name, f"its header claims {width} x {height} pixels; expected at least 1 x 1")
    if width * height > limits.image_pixels:
        raise LimitError(
            part.name,
            f"{width:,} x {height:,} = {width * height:,} pixels, "
            f"the limit (image_pixels) is {limits.image_pixels:,}; shrink it or raise the limit",
        )
    if max(width, height) > limits.image_side_px:
        raise LimitError(
            part.name, f"{width:,} x {height:,} pixels, the limit of a side (image_side_px) is {limits.image_side_px:,}"
        )
    return header
