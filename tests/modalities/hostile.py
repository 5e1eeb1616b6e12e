"""A corpus of damaged and hostile media files, the same on every run, and a program that reads all of it.

``MEDIA_WRITERS`` and the lists of other modules hold ``(modality, extension, writer)``; a writer takes nothing and
returns the bytes of one small valid file. :func:`corpus` damages each of them and adds files made to do harm.
``python hostile.py FOLDER`` reads every file of the corpus and writes one JSON line of findings for each.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import soundfile

sys.path.insert(0, str(Path(__file__).parent))
import hostile_points_sensor

Writer = tuple[str, str, Callable[[], bytes]]
RATE_HZ = 16_000
NUM_FRAMES = 10


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [H, W, 3], smooth, so that every codec keeps it."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 128], axis=2).astype(np.uint8)


def tone(seconds: float = 0.5, rate_hz: int = RATE_HZ) -> np.ndarray:
    """float32 [T], 440 Hz."""
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def encoded_image(format: str, array: np.ndarray | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture() if array is None else array).save(file, format, **options)
    return file.getvalue()


def gif(num_frames: int = 6) -> bytes:
    frames = [PIL.Image.fromarray(np.roll(picture(), 9 * i, axis=1)) for i in range(num_frames)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
    return file.getvalue()


def encoded_sound(format: str, subtype: str | None = None, wave: np.ndarray | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone() if wave is None else wave, RATE_HZ, format=format, subtype=subtype)
    return file.getvalue()


def float_wav(wave: np.ndarray) -> bytes:
    """A 32-bit float WAV; libsndfile would write the time of day into it."""
    body = wave.astype("<f4").tobytes()
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, RATE_HZ, 4 * RATE_HZ, 4, 32)
    return b"RIFF" + struct.pack("<I", 36 + len(body)) + head + b"data" + struct.pack("<I", len(body)) + body


def encoded_ogg(subtype: str) -> bytes:
    """An Ogg file whose random serial number is replaced, so that it is the same on every run."""
    data, place = bytearray(encoded_sound("OGG", subtype)), 0
    while place < len(data):
        body = place + 27 + data[place + 26]
        end = body + sum(data[place + 27 : body])
        data[place + 14 : place + 18] = struct.pack("<I", 7)
        data[place + 22 : place + 26] = bytes(4)
        data[place + 22 : place + 26] = struct.pack("<I", _ogg_crc(data[place:end]))
        place = end
    return bytes(data)


def _ogg_crc(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


def encoded_video(
    format: str,
    codec: str,
    sound: str | None = None,
    *,
    rotation: int = 0,
    num_frames: int = NUM_FRAMES,
    live: bool = False,
) -> bytes:
    """``num_frames`` frames of 64x48 at 10 per second, frame i of grey level 20 i, and a tone of the same duration."""
    file = io.BytesIO()
    with av.open(file, "w", format=format, options={"fflags": "+bitexact", **({"live": "1"} if live else {})}) as out:
        audio_hz = 48_000 if sound == "libopus" else RATE_HZ
        track = None
        if codec:
            track = out.add_stream(codec, rate=10)
            track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
            track.codec_context.thread_count = 1
            if rotation:
                track.set_display_rotation(rotation)
        voice = out.add_stream(sound, rate=audio_hz, layout="mono") if sound else None
        if voice is not None:
            samples = av.AudioFrame.from_ndarray(tone(num_frames / 10, audio_hz)[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = audio_hz, 0, Fraction(1, audio_hz)
            out.mux(voice.encode(samples))
            out.mux(voice.encode(None))
        for i in range(num_frames if track is not None else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(track.encode(frame))
        if track is not None:
            out.mux(track.encode(None))
    return file.getvalue()


MEDIA_WRITERS: list[Writer] = [
    ("image", ".jpg", lambda: encoded_image("JPEG", quality=90)),
    ("image", ".jpg", lambda: encoded_image("JPEG", progressive=True)),
    ("image", ".png", lambda: encoded_image("PNG")),
    ("image", ".webp", lambda: encoded_image("WEBP")),
    ("image", ".gif", gif),
    ("audio", ".wav", lambda: encoded_sound("WAV")),
    ("audio", ".flac", lambda: encoded_sound("FLAC")),
    ("audio", ".ogg", lambda: encoded_ogg("VORBIS")),
    ("audio", ".opus", lambda: encoded_ogg("OPUS")),
    ("audio", ".mp3", lambda: encoded_sound("MP3")),
    ("audio", ".mp4", lambda: encoded_video("mp4", "libx264", "aac")),
    ("audio", ".webm", lambda: encoded_video("webm", "libvpx", "libopus")),
    ("video", ".mp4", lambda: encoded_video("mp4", "libx264", "aac")),
    ("video", ".webm", lambda: encoded_video("webm", "libvpx", "libopus")),
    ("video", ".gif", gif),
]
ALL_WRITERS = MEDIA_WRITERS + hostile_points_sensor.WRITERS
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@dataclass(frozen=True)
class Hostile:
    """One file of the corpus; ``must_fail``: it cannot be read by any rule, so that accepting it is a fault."""

    modality: str
    name: str
    data: bytes
    must_fail: bool


def corpus(writers: list[Writer]) -> Iterator[Hostile]:
    """Every damaged copy of every writer's file, then the files made to do harm."""
    valid = [(modality, extension, writer()) for modality, extension, writer in writers]
    for index, (modality, extension, data) in enumerate(valid):
        other = next(d for m, e, d in valid[index + 1 :] + valid if e != extension)
        is_own = modality in ("image", "audio", "video")
        for what, damaged, must_fail in _damaged(data, other, seed=index):
            yield Hostile(modality, f"{index:02d}-{what}{extension}", damaged, must_fail and is_own)
    yield from _made_to_harm()


def _damaged(data: bytes, other: bytes, seed: int) -> Iterator[tuple[str, bytes, bool]]:
    rng = np.random.default_rng(seed)
    size = len(data)
    yield "empty", b"", True
    yield "html", HTML, True
    yield "zeros", bytes(size), True
    yield "random", rng.bytes(size), True
    yield "one-byte", data[:1], True
    for percent in (2, 10, 30, 50, 70, 90):
        yield f"cut-{percent}", data[: size * percent // 100], True
    yield "cut-last", data[:-1], False
    yield "twice", data + data, False
    yield "swapped-head", other[:32] + data[32:], False
    yield "other-format", other, False
    for count in (1, 1, 1, 4, 16, 64):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, size, count)
        damaged[places] ^= rng.integers(1, 256, count).astype(np.uint8)
        yield f"flip-{count}-{places[0]}", damaged.tobytes(), False
    for place in rng.choice(min(size, 256), 8, replace=False):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[place] ^= rng.integers(1, 256)
        yield f"head-flip-{place}", damaged.tobytes(), False
    for start in rng.integers(0, size, 3):
        length = max(size // 10, 8)
        yield f"zeroed-{start}", data[:start] + bytes(len(data[start : start + length])) + data[start + length :], False
    for start in rng.integers(0, size, 2):
        yield f"block-lost-{start}", data[:start] + data[start + max(size // 10, 8) :], False


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, bits: int = 1, extra: bytes = b"") -> bytes:
    """A grey PNG with a claimed size and any body."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + _chunk(b"IDAT", zlib.compress(body, 9)) + _chunk(b"IEND", b"")


def _patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def _made_to_harm() -> Iterator[Hostile]:
    jpeg, gif_data, wav = encoded_image("JPEG"), gif(), encoded_sound("WAV")
    flac, mp4 = encoded_sound("FLAC"), encoded_video("mp4", "libx264", "aac")
    frame_start = jpeg.index(b"\xff\xc0")
    images = {
        "bomb.png": png(20_000, 20_000, bytes(20_000 * 2_501)),
        "claims-huge.png": png(2**31 - 1, 2**31 - 1, b"x"),
        "claims-zero.png": png(0, 10, b"x"),
        "claims-more.png": png(4_000, 4_000, b"x"),
        "strip.png": png(1_000_000, 1, bytes(125_001)),
        "huge.jpg": _patched(jpeg, frame_start + 5, struct.pack(">HH", 65_500, 65_500)),
        "huge.gif": _patched(gif_data, 6, struct.pack("<HH", 65_535, 65_535)),
        "huge.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6 + bytes(4),
        "huge.bmp": b"BM" + struct.pack("<IIIIiiHHI", 70, 0, 54, 40, 2**30, 2**30, 1, 24, 0) + bytes(40),
        "drawing.svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    }
    sounds = {
        "claims-long.wav": _patched(wav, 40, struct.pack("<I", 0x7FFFEF00)),
        "rate-zero.wav": _patched(wav, 24, struct.pack("<I", 0)),
        "rate-huge.wav": _patched(wav, 24, struct.pack("<I", 0xFFFFFFF0)),
        "many-channels.wav": _patched(wav, 22, struct.pack("<H", 65_535)),
        "no-samples.wav": wav[:40] + bytes(4),
        "nan.wav": float_wav(np.full(800, np.nan)),
        "loud.wav": float_wav(np.full(800, 1e30)),
        "claims-long.flac": _patched(flac, 21, bytes([flac[21] | 0x0F]) + b"\xff" * 4),
        "playlist.mp4": PLAYLIST,
        "silent-movie.mp4": encoded_video("mp4", "libx264"),
    }
    time_place = mp4.index(b"mdhd") + 4 + 16
    videos = {
        "huge.gif": _patched(gif_data, 6, struct.pack("<HH", 65_535, 65_535)),
        "wide-frame.gif": _patched(gif_data, gif_data.index(b"\x2c\0\0\0\0") + 5, struct.pack("<HH", 65_535, 65_535)),
        "no-frames.gif": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";",
        "claims-long.mp4": _patched(mp4, time_place, struct.pack(">I", 0xFFFFFFF0)),
        "playlist.mp4": PLAYLIST,
        "concat.webm": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "only-sound.mp4": encoded_video("mp4", "", "aac"),
    }
    text_bomb = png(8, 8, bytes(16), extra=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9)))
    yield Hostile("image", "harm-text-bomb.png", text_bomb, False)
    for modality, files in (("image", images), ("audio", sounds), ("video", videos)):
        for name, data in files.items():
            yield Hostile(modality, f"harm-{name}", data, name != "claims-long.mp4")


def readers() -> dict[str, Any]:
    """One reader of each modality, with limits that the corpus' valid files are far below."""
    from polymodal.core.limits import Limits
    from polymodal.modalities.audio import AudioReader, AudioReaderConfig
    from polymodal.modalities.image import ImageReader, ImageReaderConfig
    from polymodal.modalities.points import PointsReader, PointsReaderConfig
    from polymodal.modalities.sensor import SensorReader, SensorReaderConfig
    from polymodal.modalities.video import VideoReader, VideoReaderConfig

    limits = Limits(audio_seconds=600.0, video_seconds=600.0)
    return {
        "image": ImageReader(ImageReaderConfig(size_px=16, resolution="tiles", max_tiles=4), limits),
        "audio": AudioReader(AudioReaderConfig(num_mels=20, clip_s=0.4), limits),
        "video": VideoReader(VideoReaderConfig(size_px=16, num_frames=6), limits),
        "points": PointsReader(PointsReaderConfig(), limits),
        "sensor": SensorReader(SensorReaderConfig(num_channels=3), limits),
    }


def verdict(reader: Any, modality: str, path: Path) -> str:
    """``read``, ``refused`` (a media error that names the file), or what went wrong."""
    from polymodal.core.errors import MediaError
    from polymodal.core.parts import media_part
    from polymodal.modalities.reader import checked_read

    details = {"rate_hz": 50.0} if modality == "sensor" and path.suffix == ".npy" else {}
    part = media_part(modality, path, **details)
    try:
        item = checked_read(reader, part, reader.measure(part))
    except MediaError as error:
        return "refused" if str(path) in str(error) else f"the error does not name the file: {error}"
    except Exception as error:  # noqa: BLE001 - any other exception is the finding
        return f"{type(error).__name__}: {error}"
    sizes = [unit.shape[0] if reader.is_ragged else 1 for unit in item.units]
    if sizes != list(item.lengths):
        return f"units of {sizes} where {item.lengths} was promised"
    return "read" if all(np.isfinite(unit).all() for unit in item.units) else "not finite"


def main() -> None:
    """Read the corpus in the folder of the first argument; a line before each file, and its verdict after it."""
    folder, by_modality = Path(sys.argv[1]), readers()
    for hostile in corpus(ALL_WRITERS):
        path = folder / f"{hostile.modality}-{hostile.name}"
        path.write_bytes(hostile.data)
        sys.stdout.write(f"{path.name}\t")
        sys.stdout.flush()
        start = time.perf_counter()
        found = verdict(by_modality[hostile.modality], hostile.modality, path)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        record = {
            "modality": hostile.modality,
            "found": found,
            "must_fail": hostile.must_fail,
            "seconds": time.perf_counter() - start,
            "peak_mib": peak_mib,
        }
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
