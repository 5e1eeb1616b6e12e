"""The audio reader: a recording -> log-mel frames ``[L, mels]`` or samples ``[L, 1]``, whole or in clips."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import soxr
from numpy.typing import NDArray
from pydantic import Field, model_validator

from polymodal.core.batch import ModelInput
from polymodal.core.errors import LimitError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Part
from polymodal.modalities.audio.decode import decode_audio
from polymodal.modalities.audio.header import AudioHeader, probe_audio
from polymodal.modalities.audio.mel import log_mel, mel_filters, num_mel_frames
from polymodal.modalities.decoding import expect_part
from polymodal.modalities.reader import Reader, ReaderConfig

_NORMAL = {"log_mel": (-4.0, 4.0), "wave": (0.0, 1.0)}


class AudioReaderConfig(ReaderConfig):
    """How recordings become model input.

    Args:
        rate_hz: every recording is resampled to this rate.
        representation: ``log_mel``: Whisper's spectrogram, ``[L, num_mels]``. ``wave``: samples, ``[L, 1]``.
        num_mels: bands of ``log_mel``.
        window_s: window of ``log_mel``; its samples are rounded.
        hop_s: time between frames of ``log_mel``; its samples are rounded.
        clip_s: length of a unit; a longer recording becomes several, the last as short as it is. None: one unit.
        pad_clip: fill the last clip with silence to ``clip_s``, as Whisper does (30 s); needs ``clip_s``.
        max_s: longest recording that is taken; a longer one is refused, never cut. None: the limits alone decide.
        mean: subtracted from the values; None: -4 for ``log_mel`` (Whisper's), 0 for ``wave``.
        std: then divided by; None: 4 for ``log_mel``, 1 for ``wave``.
    """

    modality: ClassVar[str] = "audio"

    use: Literal["audio"] = "audio"
    rate_hz: int = Field(16_000, ge=1_000, le=192_000)
    representation: Literal["log_mel", "wave"] = "log_mel"
    num_mels: int = Field(80, ge=1, le=512)
    window_s: float = Field(0.025, gt=0, le=1)
    hop_s: float = Field(0.01, gt=0, le=1)
    clip_s: float | None = Field(None, gt=0, le=3600)
    pad_clip: bool = False
    max_s: float | None = Field(None, gt=0)
    mean: float | None = None
    std: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> AudioReaderConfig:
        if self.pad_clip and self.clip_s is None:
            raise ValueError("pad_clip needs clip_s, the length to fill up to")
        if self.representation == "log_mel":
            if self.hop < 1 or self.window < 2:
                raise ValueError(
                    f"window_s and hop_s make {self.window} and {self.hop} samples at {self.rate_hz} Hz; "
                    "expected at least 2 and 1"
                )
            empty = int(np.sum(mel_filters(self.num_mels, self.window, self.rate_hz).max(axis=0) == 0))
            if empty:
                raise ValueError(
                    f"{empty} of {self.num_mels} mel bands fall between the {self.window // 2 + 1} "
                    "frequencies of the window and would stay silent; use fewer bands or a longer window"
                )
        if self.clip is not None and self.clip < self.hop:
            raise ValueError("clip_s must be at least one hop")
        return self

    @property
    def window(self) -> int:
        """Samples of the window."""
        return round(self.window_s * self.rate_hz)

    @property
    def hop(self) -> int:
        """Samples between frames."""
        return round(self.hop_s * self.rate_hz)

    @property
    def clip(self) -> int | None:
        """Samples of a clip."""
        return None if self.clip_s is None else max(1, round(self.clip_s * self.rate_hz))


class AudioReader(Reader):
    """Reads recordings; a unit is a clip, its length counted in frames (``log_mel``) or samples (``wave``)."""

    modality = "audio"
    is_ragged = True
    config: AudioReaderConfig

    def __init__(self, config: AudioReaderConfig, limits: Limits) -> None:
        super().__init__(config, limits)
        is_mel = config.representation == "log_mel"
        self._filters_FM = mel_filters(config.num_mels, config.window, config.rate_hz) if is_mel else None
        mean, std = _NORMAL[config.representation]
        self._mean = mean if config.mean is None else config.mean
        self._std = std if config.std is None else config.std

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)`` or ``(1,)``."""
        return (self.config.num_mels if self.config.representation == "log_mel" else 1,)

    def measure(self, part: Part) -> tuple[int, ...]:
        """Frames (or samples) of each clip, from the header."""
        part = expect_part(part, Audio)
        header = self._checked(part, probe_audio(part, self.limits))
        samples = self._clip_samples(num_resampled(header.num_frames, header.rate_hz, self.config.rate_hz))
        return tuple(self._length(count) for count in samples)

    def read(self, part: Part) -> ModelInput:
        """Decode, resample, cut and transform: float32 ``[L, num_mels]`` or ``[L, 1]`` a clip."""
        part = expect_part(part, Audio)
        wave_T, rate_hz = decode_audio(part, self.limits)
        self._checked(part, AudioHeader(len(wave_T), rate_hz, 1, "decoded"))
        wave_T = resampled(wave_T, rate_hz, self.config.rate_hz)
        units, start = [], 0
        for count in self._clip_samples(len(wave_T)):
            clip_T = wave_T[start : start + count]
            start += len(clip_T)
            units.append(self._unit(np.pad(clip_T, (0, count - len(clip_T)))))
        return ModelInput(units, tuple(len(unit) for unit in units))

    def _checked(self, part: Audio, header: AudioHeader) -> AudioHeader:
        if self.config.max_s is not None and header.duration_s > self.config.max_s:
            raise LimitError(
                part.name,
                f"lasts {header.duration_s:,.2f} s, this reader takes max_s = {self.config.max_s:,.2f} s; "
                "cut the recording or raise max_s",
            )
        return header

    def _clip_samples(self, total: int) -> list[int]:
        clip = self.config.clip
        if clip is None:
            return [total]
        counts = [clip] * (total // clip)
        if rest := total % clip:
            counts.append(clip if self.config.pad_clip else rest)
        return counts

    def _length(self, num_samples: int) -> int:
        return num_mel_frames(num_samples, self.config.hop) if self._filters_FM is not None else num_samples

    def _unit(self, clip_T: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._filters_FM is None:
            values = clip_T[:, None]
        else:
            values = log_mel(clip_T, self._filters_FM, self.config.window, self.config.hop)
        return ((values - self._mean) / self._std).astype(np.float32)


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
