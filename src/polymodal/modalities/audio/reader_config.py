"""What can be said about how recordings become model input."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from polymodal.modalities.audio.mel import Levels, MelScale, mel_filters
from polymodal.modalities.reader import ReaderConfig

_OF_LOG_MEL = ("mel_scale", "mel_unit_area", "min_hz", "max_hz", "levels", "end_frame", "views", "keep_filling")
_BELONGS_TO = {"standardise": "wave", "fill_frames": "fbank", **dict.fromkeys(_OF_LOG_MEL, "log_mel")}


class AudioReaderConfig(ReaderConfig):
    """How recordings become model input.

    Args:
        rate_hz: every recording is resampled to this rate.
        representation: ``log_mel``: a spectrogram ``[L, num_mels]``, Whisper's or CLAP's. ``fbank``: the filter bank
            features of Kaldi ``[L, num_mels]`` (AST, ImageBind). ``wave``: samples, ``[L, 1]``.
        num_mels: bands.
        mel_scale: of the bands.
        mel_unit_area: whether each band's filter has unit area, or a peak of 1.
        min_hz: where the lowest band begins.
        max_hz: where the highest band ends; None: half the rate.
        levels: how powers become levels: ``whisper`` or ``decibels`` (CLAP).
        end_frame: whether the frame centred on the end of a clip counts (CLAP), or is left out (Whisper).
        standardise: bring each clip of ``wave`` to mean 0 and variance 1 (wav2vec 2.0).
        window_s: window; its samples are rounded.
        hop_s: time between frames; its samples are rounded.
        clip_s: length of a unit; a longer recording becomes several, the last as short as it is. None: one unit.
        repeat: repeat a recording that is shorter than ``clip_s`` as often as it fits whole (CLAP); needs ``clip_s``.
        pad_clip: fill the last clip with silence to ``clip_s``, as Whisper does (30 s); needs ``clip_s``.
        fill_frames: fill a clip's frames up to so many with zeros, which are then normalised; for ``fbank``.
        views: give a recording as one unit of four views (CLAP's fusion), see :mod:`~polymodal.modalities.audio.views`;
            needs ``clip_s``, ``pad_clip`` and ``end_frame``.
        keep_filling: of a clip that was filled, keep the frames of the recording and so many after it, with zeros
            beyond the end of the clip (Qwen2-Audio: 2); needs ``pad_clip``. None: all frames.
        max_s: longest recording that is taken; a longer one is refused, never cut. None: the limits alone decide.
        mean: subtracted from the values; None: -4 for levels as Whisper's, else 0.
        std: then divided by; None: 4 for levels as Whisper's, else 1.
    """

    modality: ClassVar[str] = "audio"

    use: Literal["audio"] = "audio"
    rate_hz: int = Field(16_000, ge=1_000, le=192_000)
    representation: Literal["log_mel", "fbank", "wave"] = "log_mel"
    num_mels: int = Field(80, ge=1, le=512)
    mel_scale: MelScale = "slaney"
    mel_unit_area: bool = True
    min_hz: float = Field(0.0, ge=0)
    max_hz: float | None = Field(None, gt=0)
    levels: Levels = "whisper"
    end_frame: bool = False
    standardise: bool = False
    window_s: float = Field(0.025, gt=0, le=1)
    hop_s: float = Field(0.01, gt=0, le=1)
    clip_s: float | None = Field(None, gt=0, le=3600)
    repeat: bool = False
    pad_clip: bool = False
    fill_frames: int | None = Field(None, ge=1)
    views: bool = False
    keep_filling: int | None = Field(None, ge=0)
    max_s: float | None = Field(None, gt=0)
    mean: float | None = None
    std: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> AudioReaderConfig:
        filling = "pad_clip" if self.pad_clip else "repeat" if self.repeat else None
        if self.clip_s is None and filling:
            raise ValueError(f"{filling} needs clip_s, the length to fill up to")
        if self.views and not (self.pad_clip and self.end_frame):
            raise ValueError("views need pad_clip and end_frame")
        if self.keep_filling is not None and (not self.pad_clip or self.views):
            raise ValueError("keep_filling needs pad_clip, and does not go with views")
        self._check_representation()
        if self.clip is not None and self.clip < self.hop:
            raise ValueError("clip_s must be at least one hop")
        return self

    def _check_representation(self) -> None:
        for name, own in (
            ("standardise", "wave"),
            ("fill_frames", "fbank"),
            *((name, "log_mel") for name in _OF_LOG_MEL),
        ):
            if self.representation != own and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for representation: {own}, found {self.representation}")
        if self.representation == "wave":
            return
        if self.hop < 1 or self.window < 2:
            raise ValueError(
                f"window_s and hop_s make {self.window} and {self.hop} samples at {self.rate_hz} Hz; "
                "expected at least 2 and 1"
            )
        if self.representation == "log_mel":
            self._check_bands()

    def _check_bands(self) -> None:
        top = self.rate_hz / 2 if self.max_hz is None else self.max_hz
        if not self.min_hz < top <= self.rate_hz / 2:
            raise ValueError(
                f"the bands reach from {self.min_hz:g} to {top:g} Hz; expected a range within 0 to {self.rate_hz / 2:g}"
            )
        empty = int(np.sum(self.filters().max(axis=0) == 0))
        if empty:
            raise ValueError(
                f"{empty} of {self.num_mels} mel bands fall between the {self.window // 2 + 1} "
                "frequencies of the window and would stay silent; use fewer bands or a longer window"
            )

    def filters(self) -> NDArray[np.float64]:
        """The filters ``[F, M]`` of ``log_mel``."""
        return mel_filters(
            self.num_mels,
            self.window,
            self.rate_hz,
            scale=self.mel_scale,
            unit_area=self.mel_unit_area,
            min_hz=self.min_hz,
            max_hz=self.max_hz,
        )

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

    @property
    def shift_and_scale(self) -> tuple[float, float]:
        """``mean`` and ``std`` with their defaults filled in."""
        is_whisper = self.representation == "log_mel" and self.levels == "whisper"
        mean, std = (-4.0, 4.0) if is_whisper else (0.0, 1.0)
        return mean if self.mean is None else self.mean, std if self.std is None else self.std
