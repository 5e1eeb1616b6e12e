"""The sensor reader: a recording at any rate -> windows at the model's rate, channels in the model's order."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt, model_validator

from polymodal.core.batch import ModelInput
from polymodal.core.errors import LimitError, UnsupportedMediaError
from polymodal.core.parts import Part
from polymodal.modalities.raw import check_count
from polymodal.modalities.reader import Reader, ReaderConfig
from polymodal.modalities.sensor.clock import resample_linear, resampled_rows
from polymodal.modalities.sensor.decode import SensorHeader, decode_sensor, probe_sensor


class SensorReaderConfig(ReaderConfig):
    """How a recording becomes model input: units float32 ``[L, C]``, one per window."""

    modality: ClassVar[str] = "sensor"
    use: Literal["sensor"] = "sensor"
    rate_hz: PositiveFloat | None = None
    """Recordings at another rate are resampled to this one by linear interpolation; None keeps each as it is."""
    channels: tuple[str, ...] | None = None
    """The channels to take, by name and in this order; others are not used. None takes all, as they come."""
    num_channels: PositiveInt | None = None
    """How many channels a recording has; needed only without names, where it is 6 (two three-axis sensors) if unset."""
    window_s: PositiveFloat | None = None
    """Cut into windows of this many seconds, the last one shorter; None: the whole recording is one unit."""
    max_s: PositiveFloat | None = None
    """Longer recordings are refused by name; None: only the limits apply."""
    normalise: Literal["none", "stated", "item"] = "none"
    """``none``: values as stored; ``stated``: minus ``mean``, over ``std``; ``item``: each channel of each recording to
    mean 0 and standard deviation 1 (a constant channel to 0)."""
    mean: tuple[float, ...] | None = None
    """For ``stated``: of each channel."""
    std: tuple[PositiveFloat, ...] | None = None
    """One value per channel each, with ``normalise: stated`` only."""

    @model_validator(mode="after")
    def _check(self) -> SensorReaderConfig:
        if self.channels is not None:
            if not self.channels or len(set(self.channels)) != len(self.channels):
                raise ValueError("channels: expected distinct names, at least one")
            if self.num_channels not in (None, len(self.channels)):
                raise ValueError(f"num_channels is {self.num_channels}, but {len(self.channels)} channels are named")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if (values is not None) != (self.normalise == "stated"):
                raise ValueError(f"{key} goes together with normalise: stated")
            if values is not None and len(values) != self.width:
                raise ValueError(f"{key} has {len(values)} values for {self.width} channels")
        return self

    @property
    def width(self) -> int:
        """Channels of a unit."""
        return len(self.channels) if self.channels is not None else self.num_channels or 6


class SensorReader(Reader):
    """Reads ``Sensor`` parts."""

    modality = "sensor"
    is_ragged = True
    config: SensorReaderConfig

    def measure(self, part: Part) -> tuple[int, ...]:
        """The rows of each window at the reader's rate.

        Raises:
            MediaError: as :func:`probe_sensor` does, or if channels are missing or the recording is too long.
        """
        return self._windows(self._probe(part), part)

    def read(self, part: Part) -> ModelInput:
        """Decode, choose channels, resample, normalise and cut.

        Raises:
            MediaError: as :func:`decode_sensor` and :meth:`measure` do.
        """
        header = self._probe(part)
        lengths = self._windows(header, part)
        values, rate_hz, _ = decode_sensor(part, self.limits)
        if self.config.channels is not None and header.channels is not None:
            values = values[:, [header.channels.index(channel) for channel in self.config.channels]]
        if self.config.rate_hz is not None and rate_hz != self.config.rate_hz:
            values = resample_linear(values, rate_hz, self.config.rate_hz)
        values = self._normalise(values)
        cuts = np.cumsum(lengths)[:-1]
        return ModelInput([np.ascontiguousarray(unit) for unit in np.split(values, cuts)], lengths)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(channels,)``."""
        return (self.config.width,)

    def _probe(self, part: Part) -> SensorHeader:
        header = probe_sensor(part, self.limits)
        name = getattr(part, "name", part.modality)
        if self.config.channels is None:
            if header.num_channels != self.config.width:
                found = f" {list(header.channels)}" if header.channels else ""
                raise UnsupportedMediaError(
                    name, f"has {header.num_channels} channels{found}; this reader takes {self.config.width} "
                    "(set channels to choose by name, or num_channels)"
                )  # fmt: skip
        elif header.channels is None:
            raise UnsupportedMediaError(
                name, f"its {header.num_channels} channels have no names; expected {list(self.config.channels)}. "
                "Give channels with the part"
            )  # fmt: skip
        elif missing := [channel for channel in self.config.channels if channel not in header.channels]:
            raise UnsupportedMediaError(
                name, f"lacks the channels {missing}; found {list(header.channels)}, expected "
                f"{list(self.config.channels)}"
            )  # fmt: skip
        if self.config.max_s is not None and header.duration_s > self.config.max_s:
            raise LimitError(
                name, f"lasts {header.duration_s:g} s, the reader's limit (max_s) is {self.config.max_s:g} s"
            )
        return header

    def _windows(self, header: SensorHeader, part: Part) -> tuple[int, ...]:
        rows, rate_hz = header.num_rows, header.rate_hz
        if self.config.rate_hz is not None and rate_hz != self.config.rate_hz:
            rows, rate_hz = resampled_rows(rows, rate_hz, self.config.rate_hz), self.config.rate_hz
            what = f"rows at {rate_hz:g} Hz"
            check_count(getattr(part, "name", "sensor"), what, rows, self.limits.sensor_rows, "sensor_rows")
        if self.config.window_s is None:
            return (rows,)
        size = max(1, round(self.config.window_s * rate_hz))
        return (size,) * (rows // size) + ((rows % size,) if rows % size else ())

    def _normalise(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.config.normalise == "none":
            return values
        if self.config.normalise == "stated":
            mean, std = np.array(self.config.mean, np.float64), np.array(self.config.std, np.float64)
        else:
            mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
            std = np.where(std > 0, std, 1.0)
        result: NDArray[np.float32] = ((values - mean) / std).astype(np.float32)
        return result
