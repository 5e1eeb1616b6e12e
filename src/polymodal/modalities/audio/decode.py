"""Samples of a recording: mono, float32, at the rate of the file.

``T`` samples, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from polymodal.core.errors import CorruptMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, as_float_array
from polymodal.modalities.audio.header import TAKES, AudioHeader, audio_track, probe_audio, sound_source
from polymodal.modalities.container import opened_container
from polymodal.modalities.decoding import is_encoded, named_errors, opened

BLOCK = 1 << 18
"""Samples per channel that are decoded at a time, so that many channels never stand in memory together."""
PEAK = 8.0
"""Largest magnitude taken for sound in -1..1 with too much gain; above it the samples have another scale."""
TRACK_TOLERANCE_S = 0.05
"""How far the audio track of a container may differ from its stated length (or two codec frames, if that is more)."""


def decode_audio(part: Audio, limits: Limits) -> tuple[NDArray[np.float32], int]:
    """Decode one recording.

    Channels are averaged and values beyond -1..1 are clipped. The number of samples is the one the header promises.
    Formats whose header cannot be exact may differ a little, which is filled with silence or cut: MP3 by one codec
    frame (1,152 samples from 32 kHz on, 576 below), the track of a container by 50 ms or two codec frames.

    Returns:
        float32 ``[T]`` in -1..1, and the sampling rate in Hz.

    Raises:
        CorruptMediaError: if it is truncated, damaged, empty or holds NaN.
        LimitError: if the header claims more than the limits allow (nothing is decoded then).
        UnsupportedMediaError: if the source or format is none that is read.
    """
    header = probe_audio(part, limits)
    if not is_encoded(part):
        mono = as_float_array(part.source, part.name)
        mono = mono if mono.ndim == 1 else mono.mean(axis=1)
    elif header.format in ("WAV", "FLAC", "OGG", "MP3", "AIFF"):
        tolerance = 0
        if header.format == "MP3":
            tolerance = 1152 if header.rate_hz >= 32_000 else 576
        mono = _joined(part, header, _sound_blocks(part, limits, header), tolerance)
    else:
        mono = _track(part, limits, header)
    return _in_range(part, mono), header.rate_hz


def _sound_blocks(part: Audio, limits: Limits, header: AudioHeader) -> Iterator[NDArray[np.float32]]:
    """Mono blocks of a sound file."""
    with (
        opened(part, limits, TAKES) as (file, _),
        named_errors(part, f"decoding the {header.format} file"),
        soundfile.SoundFile(sound_source(part, file)) as sound,
    ):
        while len(block_TC := sound.read(BLOCK, dtype="float32", always_2d=True)):
            yield block_TC[:, 0] if header.channels == 1 else block_TC.mean(axis=1)


def _track(part: Audio, limits: Limits, header: AudioHeader) -> NDArray[np.float32]:
    with opened_container(part, limits, TAKES) as container:
        stream = audio_track(part, container)
        seconds = max(TRACK_TOLERANCE_S, 2 * (stream.codec_context.frame_size or 0) / header.rate_hz)
        tolerance = round(seconds * header.rate_hz)
        return _joined(part, header, _track_blocks(part, container, stream, header.rate_hz), tolerance)


def _track_blocks(part: Audio, container: Any, stream: Any, rate_hz: int) -> Iterator[NDArray[np.float32]]:
    """Mono blocks of a container's audio track."""
    with named_errors(part, "decoding the audio track"):
        to_float = av.AudioResampler(format="fltp", rate=rate_hz)
        for frame in container.decode(stream):
            for block in to_float.resample(frame):
                yield block.to_ndarray().mean(axis=0, dtype=np.float32)


def _joined(
    part: Audio, header: AudioHeader, blocks: Iterator[NDArray[np.float32]], tolerance: int
) -> NDArray[np.float32]:
    """The blocks as one array of exactly the promised length.

    Raises:
        CorruptMediaError: if the content differs from it by more than ``tolerance`` samples.
    """
    kept: list[NDArray[np.float32]] = []
    found = 0
    for block in blocks:
        kept.append(block)
        found += len(block)
        if found > header.num_frames + tolerance:
            break
    if abs(found - header.num_frames) > tolerance:
        more = "at least " if found > header.num_frames else ""
        raise CorruptMediaError(
            part.name,
            f"the header promises {header.num_frames:,} samples, the content has {more}{found:,} "
            f"(tolerance {tolerance:,}); the file is truncated or its header is wrong",
        )
    kept.append(np.zeros(max(0, header.num_frames - found), np.float32))
    return np.concatenate(kept)[: header.num_frames]


def _in_range(part: Audio, mono: NDArray[np.float32]) -> NDArray[np.float32]:
    mono = as_float_array(mono, part.name)
    peak = float(np.abs(mono).max())
    if peak > PEAK:
        raise CorruptMediaError(
            part.name, f"its samples reach {peak:,.0f}; expected -1..1 (divide 16-bit samples by 32768)"
        )
    return np.clip(mono, -1.0, 1.0) if peak > 1.0 else mono
