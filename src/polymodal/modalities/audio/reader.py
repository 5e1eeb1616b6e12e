"""The audio reader: a recording -> frames ``[L, mels]`` or samples ``[L, 1]``, whole or in clips."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import soxr
from numpy.typing import NDArray

from polymodal.core.batch import ModelInput
from polymodal.core.errors import LimitError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Part
from polymodal.modalities.audio.decode import decode_audio
from polymodal.modalities.audio.fbank import fbank, fbank_filters, num_fbank_frames
from polymodal.modalities.audio.header import AudioHeader, probe_audio
from polymodal.modalities.audio.mel import log_mel, num_mel_frames
from polymodal.modalities.audio.reader_config import AudioReaderConfig
from polymodal.modalities.audio.views import NUM_VIEWS, four_views
from polymodal.modalities.decoding import expect_part
from polymodal.modalities.reader import Reader

_VARIANCE_FLOOR = 1e-7
"""Added to the variance of a clip that is standardised, as wav2vec 2.0's published preprocessing does."""


class Clip(NamedTuple):
    """A piece of a recording: its samples, and with the silence that fills it."""

    recorded: int
    filled: int


class AudioReader(Reader):
    """Reads recordings; a unit is a clip, its length counted in frames, or in samples for ``wave``."""

    modality = "audio"
    is_ragged = True
    config: AudioReaderConfig

    def __init__(self, config: AudioReaderConfig, limits: Limits) -> None:
        super().__init__(config, limits)
        self._filters_FM: NDArray[np.float64] | None = None
        if config.representation == "log_mel":
            self._filters_FM = config.filters()
        elif config.representation == "fbank":
            self._filters_FM = fbank_filters(config.num_mels, config.window, config.rate_hz)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``, ``(4, num_mels)`` for views, ``(1,)`` for samples."""
        if self.config.representation == "wave":
            return (1,)
        return (NUM_VIEWS, self.config.num_mels) if self.config.views else (self.config.num_mels,)

    def measure(self, part: Part) -> tuple[int, ...]:
        """Frames (or samples) of each clip, from the header."""
        part = expect_part(part, Audio)
        header = self._checked(part, probe_audio(part, self.limits))
        samples = num_resampled(header.num_frames, header.rate_hz, self.config.rate_hz)
        return tuple(self._length(clip) for clip in self._clips(samples))

    def read(self, part: Part) -> ModelInput:
        """Decode, resample, cut and transform: float32 ``[L, ...]`` a clip."""
        part = expect_part(part, Audio)
        wave_T, rate_hz = decode_audio(part, self.limits)
        self._checked(part, AudioHeader(len(wave_T), rate_hz, 1, "decoded"))
        wave_T = resampled(wave_T, rate_hz, self.config.rate_hz)
        clips = self._clips(len(wave_T))
        times = self._repeats(len(wave_T))
        wave_T = np.tile(wave_T, times) if times > 1 else wave_T
        units, start = [], 0
        for clip in clips:
            clip_T = wave_T[start : start + clip.recorded]
            start += clip.recorded
            units.append(self._unit(np.pad(clip_T, (0, clip.filled - clip.recorded)), clip))
        return ModelInput(units, tuple(len(unit) for unit in units))

    def _checked(self, part: Audio, header: AudioHeader) -> AudioHeader:
        if self.config.max_s is not None and header.duration_s > self.config.max_s:
            raise LimitError(
                part.name,
                f"lasts {header.duration_s:,.2f} s, this reader takes max_s = {self.config.max_s:,.2f} s; "
                "cut the recording or raise max_s",
            )
        return header

    def _repeats(self, total: int) -> int:
        """How often a recording of so many samples is heard."""
        clip = self.config.clip
        return max(1, clip // total) if self.config.repeat and clip is not None else 1

    def _clips(self, total: int) -> list[Clip]:
        size = self.config.clip
        total *= self._repeats(total)
        if size is None:
            return [Clip(total, total)]
        if self.config.views:
            return [Clip(total, max(size, total))]
        clips = [Clip(size, size)] * (total // size)
        if rest := total % size:
            clips.append(Clip(rest, size if self.config.pad_clip else rest))
        return clips

    def _length(self, clip: Clip) -> int:
        config = self.config
        if config.representation == "wave":
            return clip.filled
        if config.representation == "fbank":
            found = num_fbank_frames(clip.filled, config.window, config.hop)
            return max(found, config.fill_frames or 0)
        if config.keep_filling is not None:
            return num_mel_frames(clip.recorded, config.hop, config.end_frame) + config.keep_filling
        shown = clip.filled if not config.views or config.clip is None else config.clip
        return num_mel_frames(shown, config.hop, config.end_frame)

    def _unit(self, clip_T: NDArray[np.float32], clip: Clip) -> NDArray[np.float32]:
        """One clip as model input; what fills up normalised frames is 0, what fills up raw ones is normalised too."""
        config, length = self.config, self._length(clip)
        mean, std = config.shift_and_scale
        if config.representation == "wave":
            values = _standardised(clip_T) if config.standardise else clip_T[:, None]
        elif config.representation == "fbank":
            assert self._filters_FM is not None
            values = _resized(fbank(clip_T, self._filters_FM, config.window, config.hop), length)
        else:
            values = self._log_mel(clip_T)
            values = four_views(values, length) if config.views else values
        scaled = ((values - mean) / std).astype(np.float32)
        return _resized(scaled, length)

    def _log_mel(self, clip_T: NDArray[np.float32]) -> NDArray[np.float32]:
        config = self.config
        assert self._filters_FM is not None
        return log_mel(
            clip_T, self._filters_FM, config.window, config.hop, levels=config.levels, end_frame=config.end_frame
        )


def _standardised(clip_T: NDArray[np.float32]) -> NDArray[np.float64]:
    wide_T = clip_T.astype(np.float64)
    values: NDArray[np.float64] = (wide_T - wide_T.mean()) / np.sqrt(wide_T.var() + _VARIANCE_FLOOR)
    return values[:, None]


def _resized(values: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """The first ``length`` frames, with zeros where there are fewer."""
    missing = length - len(values)
    return values[:length] if missing <= 0 else np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)])


def num_resampled(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Samples after resampling: the exact ratio, halves rounded up, at least one."""
    return max(1, (2 * num_samples * to_hz + from_hz) // (2 * from_hz))


def resampled(wave_T: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """``wave_T`` at another rate, exactly :func:`num_resampled` samples long (silence fills what the filter lacks)."""
    if from_hz == to_hz:
        return wave_T
    count = num_resampled(len(wave_T), from_hz, to_hz)
    result = np.asarray(soxr.resample(wave_T, from_hz, to_hz, quality="HQ"), dtype=np.float32)[:count]
    return np.pad(result, (0, count - len(result)))
