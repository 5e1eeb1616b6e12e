"""What a recording says about itself: length, rate, channels, without decoding a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import soundfile

from polymodal.core.errors import CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio
from polymodal.modalities.audio.complete import check_ogg, check_wav
from polymodal.modalities.container import container_format, opened_container, packet_seconds, stream_seconds
from polymodal.modalities.decoding import check_array, describe_head, is_encoded, named_errors, opened

TAKES = (
    "a path or bytes (WAV, FLAC, OGG, MP3, AIFF, or the audio track of MP4, WebM, MKV, AVI), "
    "or a float array [T] or [T, C] in -1..1 with rate_hz"
)
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """Size and kind of a recording.

    Args:
        num_frames: samples per channel; what the decoder returns, exactly.
        rate_hz: sampling rate.
        channels: number of channels.
        format: ``WAV``, ``FLAC``, ``OGG``, ``MP3``, ``AIFF``, ``mov``, ``matroska``, ``avi`` or ``array``.
    """

    num_frames: int
    rate_hz: int
    channels: int
    format: str

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_frames / self.rate_hz


def probe_audio(part: Audio, limits: Limits) -> AudioHeader:
    """Read the header.

    Where a container does not state the length of its audio track, its packets are read (not decoded) to know it.

    Raises:
        CorruptMediaError: if it is damaged, truncated or empty.
        LimitError: if the file, its duration or its channels are above the limits.
        UnsupportedMediaError: if the source, format or rate is none that is read, or there is no audio track.
    """
    if not is_encoded(part):
        return _within(part, _array_header(part), limits)
    with opened(part, limits, TAKES) as (file, size):
        head = file.read(12)
        format = sound_format(head)
        if format is None and container_format(head) is None:
            raise UnsupportedMediaError(
                part.name, f"is no recording that can be read: {describe_head(head)}; expected {TAKES}"
            )
        if format is not None:
            header = _sound_header(part, file, size, format)
            return _within(part, header, limits)
    return _within(part, _track_header(part, limits), limits)


def sound_format(head: bytes) -> str | None:
    """The sound file format that the first 12 bytes announce; None if it is none that ``soundfile`` is given."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return "WAV"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE6 == 0xE2):
        return "MP3"
    return {b"fLaC": "FLAC", b"OggS": "OGG"}.get(head[:4])


def sound_source(part: Audio, file: BinaryIO) -> Any:
    """What ``soundfile`` opens: the path itself, which is faster than a Python file, or the bytes."""
    if part.path is not None:
        return str(part.path)
    file.seek(0)
    return file


def audio_track(part: Audio, container: Any) -> Any:
    """The audio stream of an open container.

    Raises:
        UnsupportedMediaError: if there is none.
    """
    if not container.streams.audio:
        raise UnsupportedMediaError(part.name, "has no audio track; expected a file with sound")
    return container.streams.audio[0]


def _sound_header(part: Audio, file: BinaryIO, size: int, format: str) -> AudioHeader:
    with named_errors(part, f"reading the {format} header"):
        if format == "WAV":
            check_wav(part, file, size)
        if format == "OGG":
            check_ogg(part, file, size)
        with soundfile.SoundFile(sound_source(part, file)) as sound:
            return AudioHeader(sound.frames, sound.samplerate, sound.channels, format)


def _track_header(part: Audio, limits: Limits) -> AudioHeader:
    with opened_container(part, limits, TAKES) as container:
        stream = audio_track(part, container)
        with named_errors(part, "reading the audio track"):
            seconds = stream_seconds(stream)
            if seconds is None:
                seconds, _ = packet_seconds(container, stream)
            rate = int(stream.rate or 0)
            channels = int(stream.codec_context.layout.nb_channels)
            return AudioHeader(
                round(seconds * rate), rate, channels, str(container.format.name).split(",", maxsplit=1)[0]
            )


def _array_header(part: Audio) -> AudioHeader:
    array = check_array(part, TAKES)
    if array.dtype.kind != "f":
        hint = "; divide by 32768 for 16-bit samples" if array.dtype.kind in "iu" else ""
        raise UnsupportedMediaError(part.name, f"found an array of {array.dtype}, expected floats in -1..1{hint}")
    if array.ndim not in (1, 2):
        raise UnsupportedMediaError(
            part.name, f"found an array of shape {array.shape}, expected [T] or [T, C] (channels last)"
        )
    if part.rate_hz is None:
        raise UnsupportedMediaError(part.name, "an array has no sampling rate; give it: Audio(array, rate_hz=16000)")
    return AudioHeader(array.shape[0], part.rate_hz, 1 if array.ndim == 1 else array.shape[1], "array")


def _within(part: Audio, header: AudioHeader, limits: Limits) -> AudioHeader:
    rate = header.rate_hz
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise UnsupportedMediaError(
            part.name, f"a sampling rate of {rate:,} Hz; expected {MIN_RATE_HZ:,} to {MAX_RATE_HZ:,} Hz for sound"
        )
    if part.rate_hz is not None and part.rate_hz != rate:
        raise UnsupportedMediaError(
            part.name, f"the file's header says {rate:,} Hz, rate_hz says {part.rate_hz:,}; leave rate_hz out for files"
        )
    if header.num_frames < 1 or header.channels < 1:
        raise CorruptMediaError(
            part.name, f"holds {header.num_frames} samples in {header.channels} channels; expected at least one of each"
        )
    if header.channels > limits.audio_channels:
        hint = "; an array is [T, C], not [C, T]" if header.format == "array" else ""
        raise LimitError(
            part.name, f"{header.channels:,} channels, the limit (audio_channels) is {limits.audio_channels}{hint}"
        )
    if header.duration_s > limits.audio_seconds:
        raise LimitError(
            part.name,
            f"lasts {header.duration_s:,.1f} s, the limit (audio_seconds) is {limits.audio_seconds:,.1f}; "
            "cut it or raise the limit",
        )
    return header
