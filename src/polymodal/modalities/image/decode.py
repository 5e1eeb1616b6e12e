"""Pixels of an image: RGB, upright, 8 bits, whatever the file was.

Rules, applied once and here only: EXIF orientation is undone; transparency is composited on white; 16-bit grey is
scaled to 8; palettes, CMYK and grey become RGB; of an animation the first frame is read. A truncated file is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import simplejpeg
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Image
from polymodal.modalities.decoding import is_encoded, named_errors
from polymodal.modalities.image.header import ImageHeader, header_of, opened_image, probe_image, settled_header

_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def decode_image(part: Image, limits: Limits) -> NDArray[np.uint8]:
    """Decode one image.

    Returns:
        uint8 ``[H, W, 3]`` RGB, upright, C-contiguous; never a view of an array source.

    Raises:
        CorruptMediaError: if the file is truncated or damaged.
        LimitError: if the header claims more than the limits allow (nothing is decoded then).
        UnsupportedMediaError: if the source, format or pixel mode is none that is read.
    """
    if isinstance(part.source, PIL.Image.Image):
        header = header_of(part, part.source, limits)
        return _upright(_pillow_pixels(part, part.source), header)
    if not is_encoded(part):
        probe_image(part, limits)
        return _array_pixels(part.source)
    known = settled_header(part, limits)
    if known is not None and _is_plain_jpeg(known):
        header, pixels = known, _jpeg_pixels(part, limits)
    else:
        with opened_image(part, limits) as image:
            header = header_of(part, image, limits)
            pixels = _jpeg_pixels(part, limits) if _is_plain_jpeg(header) else _pillow_pixels(part, image)
    pixels = _upright(pixels, header)
    if pixels.shape[:2] != (header.height_px, header.width_px):
        raise CorruptMediaError(
            part.name,
            f"the header states {header.width_px} x {header.height_px} pixels, "
            f"the content has {pixels.shape[1]} x {pixels.shape[0]}",
        )
    return pixels


def _is_plain_jpeg(header: ImageHeader) -> bool:
    """Whether the faster decoder takes it."""
    return header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L")


def _jpeg_pixels(part: Image, limits: Limits) -> NDArray[np.uint8]:
    data = part.read_bytes(limits.file_bytes)
    with named_errors(part, "decoding the JPEG"):
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return pixels


def _pillow_pixels(part: Image, image: PIL.Image.Image) -> NDArray[np.uint8]:
    with named_errors(part, f"decoding the {image.format or 'PIL'} image"):
        image.load()
        mode = image.mode
        if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
            return _grey16_pixels(image)
        if mode in _WITH_ALPHA or (mode in _PLAIN and "transparency" in image.info):
            return on_white(np.asarray(image.convert("RGBA")))
        if mode in _PLAIN:
            return np.array(image.convert("RGB"))
    raise UnsupportedMediaError(
        part.name,
        f"found pixel mode {mode!r} (32-bit integers or floats have no stated range); "
        "expected 8-bit or 16-bit grey, RGB, RGBA, palette or CMYK: convert it to RGB first",
    )


def _grey16_pixels(image: PIL.Image.Image) -> NDArray[np.uint8]:
    grey = np.asarray(image).astype(np.uint32)
    grey8 = ((grey * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(grey8[:, :, None], 3, axis=2)


def _array_pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.shape[2] == 4:
        return on_white(array)
    return np.array(array, order="C")


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite ``[H, W, 4]`` on white: ``alpha * rgb + (255 - alpha) * white``, rounded."""
    if rgba[:, :, 3].min() == 255:
        return np.ascontiguousarray(rgba[:, :, :3])
    alpha = rgba[:, :, 3:].astype(np.uint32)
    mixed = rgba[:, :, :3] * alpha + (255 - alpha) * 255
    return ((mixed + 127) // 255).astype(np.uint8)


def _upright(pixels: NDArray[np.uint8], header: ImageHeader) -> NDArray[np.uint8]:
    """Undo the EXIF orientation: the transformation that its value asks a viewer to apply."""
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: x[::-1].transpose(1, 0, 2),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: x.transpose(1, 0, 2)[::-1],
    }[header.orientation](pixels)
    return np.ascontiguousarray(turned)
