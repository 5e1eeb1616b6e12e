"""Parts as HTML: pictures, players and drawings that need no other file."""

from __future__ import annotations

import base64
import io
import wave
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from polymodal.core.errors import MediaError, MissingExtraError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Image, Part, Points, Sensor, Text, Video
from polymodal.evaluation import charts
from polymodal.evaluation.markup import Markup, element
from polymodal.modalities.audio.decode import decode_audio
from polymodal.modalities.image.decode import decode_image
from polymodal.modalities.points.decode import decode_points
from polymodal.modalities.sensor.decode import decode_sensor
from polymodal.modalities.video.decode import decode_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIDE_PX = 320
_SMALL_PX = 160
_SECONDS = 30
_FRAMES = 16
_LIMITS = Limits()


def part_to_html(part: Part) -> Markup:
    """The part as a person sees or hears it; a note where it cannot be decoded."""
    try:
        return _drawn(part)
    except (MediaError, MissingExtraError) as error:
        return element("div", f"{part.modality} cannot be shown: {error}", class_="media missing")


def _drawn(part: Part) -> Markup:
    if isinstance(part, Text):
        return element("div", part.text, class_="media text")
    if isinstance(part, Image):
        content: Markup = _picture(decode_image(part, _LIMITS), "image")
    elif isinstance(part, Video):
        content = _film(part)
    elif isinstance(part, Audio):
        content = _player(part)
    elif isinstance(part, Points):
        content = charts.cloud(*decode_points(part, _LIMITS))
    elif isinstance(part, Sensor):
        values, _, channels = decode_sensor(part, _LIMITS)
        content = charts.recording(values, channels)
    else:
        content = element("p", f"a part of modality {part.modality}")
    label = element("span", part.modality, class_="kind")
    return element("div", content, label, class_=f"media {part.modality}")


def _picture(pixels_HW3: NDArray[np.uint8], alt: str) -> Markup:
    picture = PIL.Image.fromarray(pixels_HW3)
    picture.thumbnail((_SIDE_PX, _SIDE_PX))
    buffer = io.BytesIO()
    # A drawing is smaller and sharper as PNG, a photograph is smaller as JPEG.
    if picture.getcolors(4096) is not None:
        picture.save(buffer, "PNG", optimize=True)
        return _img("image/png", buffer.getvalue(), alt, picture.size)
    picture.save(buffer, "JPEG", quality=85)
    return _img("image/jpeg", buffer.getvalue(), alt, picture.size)


def _film(part: Video) -> Markup:
    """An animated GIF of a few frames: it plays everywhere, without controls."""
    frames, times = decode_frames(part, _LIMITS, num_frames=_FRAMES)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((_SIDE_PX // 2, _SIDE_PX // 2))
    step_ms = 1000 * float(np.diff(times).mean()) if len(times) > 1 else 500.0
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=int(np.clip(step_ms, 60, 1000)), loop=0
    )
    return _img("image/gif", buffer.getvalue(), "video", pictures[0].size)


def _img(kind: str, data: bytes, alt: str, size_px: tuple[int, int]) -> Markup:
    crisp = "crisp" if max(size_px) <= _SMALL_PX else None
    return element("img", src=_data_uri(kind, data), alt=alt, class_=crisp, width=size_px[0], height=size_px[1])


def _player(part: Audio) -> Markup:
    samples, rate_hz = decode_audio(part, _LIMITS)
    samples = samples[: _SECONDS * rate_hz]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    source = _data_uri("audio/wav", buffer.getvalue())
    return element("div", charts.waveform(samples), element("audio", controls=True, preload="none", src=source))


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
