"""Spectrograms of published audio models against the reference library's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from polymodal.core.limits import Limits
from polymodal.core.parts import Audio
from polymodal.modalities.audio import AudioReader, AudioReaderConfig
from polymodal.modalities.audio.fbank import fbank, fbank_filters, num_fbank_frames
from polymodal.modalities.audio.views import four_views

CLAP = {
    "rate_hz": 48_000,
    "num_mels": 64,
    "window_s": 1024 / 48_000,
    "max_hz": 14_000.0,
    "levels": "decibels",
    "end_frame": True,
    "clip_s": 1.0,
    "repeat": True,
    "pad_clip": True,
}


def sound(num_samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tone = 0.3 * np.sin(np.arange(num_samples) * (0.02 + 0.1 * rng.random()))
    return (tone + rng.uniform(-0.2, 0.2, num_samples)).astype(np.float32)


def read(config: dict[str, Any], wave: np.ndarray) -> list[np.ndarray]:
    parsed = AudioReaderConfig.parse({"use": "audio", **config})
    reader, part = AudioReader(parsed, Limits()), Audio(wave, rate_hz=parsed.rate_hz)
    found = reader.read(part)
    assert found.lengths == reader.measure(part) == tuple(len(unit) for unit in found.units)
    assert all(unit.shape[1:] == reader.unit_shape for unit in found.units)
    return found.units


@pytest.mark.parametrize("num_samples", [9_000, 23_999, 30_000, 48_000])
def test_short_recordings_are_repeated_as_clap_repeats_them(num_samples: int) -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.ClapFeatureExtractor(max_length_s=1, truncation="rand_trunc")
    wave = sound(num_samples)
    expected = extractor(wave, sampling_rate=48_000, return_tensors="np").input_features[0, 0]
    units = read(CLAP, wave)
    assert len(units) == 1 and units[0].shape == expected.shape == (101, 64)
    np.testing.assert_allclose(units[0], expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("num_samples", [20_000, 48_000, 48_200, 50_000, 130_000])
def test_four_views_are_those_of_clap_with_crops_in_the_middle_of_each_third(
    num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.ClapFeatureExtractor(max_length_s=1, truncation="fusion")
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    wave = sound(num_samples)
    expected = extractor(wave, sampling_rate=48_000, return_tensors="np").input_features[0]
    changes = {"views": True, "mel_scale": "htk", "mel_unit_area": False}
    (unit,) = read({**CLAP, **changes}, wave)
    assert unit.shape == (101, 4, 64)
    np.testing.assert_allclose(unit.transpose(1, 0, 2), expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_a_recording_that_fits_is_seen_four_times() -> None:
    mel = np.arange(12, dtype=np.float32).reshape(6, 2)
    views = four_views(mel, 6)
    assert all((views[:, view] == mel).all() for view in range(4))
    longer = four_views(mel, 2)
    assert longer[:, 1, 0].tolist() == [2, 4] and longer[:, 3, 0].tolist() == [8, 10]
    np.testing.assert_allclose(longer[:, 0, 0], [2, 8])


@pytest.mark.parametrize("num_samples", [400, 1_000, 16_000])
def test_fbank_equals_the_reference(num_samples: int) -> None:
    library = pytest.importorskip("transformers.audio_utils")
    wave = sound(num_samples)
    filters = library.mel_filter_bank(257, 128, 20, 8_000, 16_000, mel_scale="kaldi", triangularize_in_mel_space=True)
    centred = wave.astype(np.float64) - wave.astype(np.float64).mean()
    expected = library.spectrogram(
        centred,
        library.window_function(400, "hann", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    ).T
    found = fbank(wave, fbank_filters(128, 400, 16_000), 400, 160)
    assert found.shape == expected.shape == (num_fbank_frames(num_samples, 400, 160), 128)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_fbank_frames_are_filled_before_they_are_normalised() -> None:
    config = {"representation": "fbank", "num_mels": 16, "clip_s": 0.1, "pad_clip": True, "fill_frames": 12}
    units = read({**config, "mean": -4.0, "std": 2.0}, sound(2_000))
    assert [len(unit) for unit in units] == [12, 12]
    assert (units[0][8:] == 2.0).all() and not (units[0][:8] == 2.0).any()


def test_only_the_recorded_frames_and_what_the_convolutions_read_after_them_are_kept() -> None:
    config = {"num_mels": 20, "clip_s": 0.2, "pad_clip": True}
    wave = sound(3_300)
    whole, last = read(config, wave)
    cut, rest = read({**config, "keep_filling": 2}, wave)
    assert len(whole) == len(last) == 20 and len(cut) == 22 and len(rest) == 1 + 2
    np.testing.assert_array_equal(cut[:20], whole)
    assert not cut[20:].any()
    np.testing.assert_array_equal(rest, last[:3])


def test_samples_are_standardised_clip_by_clip() -> None:
    units = read({"representation": "wave", "standardise": True, "clip_s": 0.1}, 0.5 * sound(2_400))
    assert [len(unit) for unit in units] == [1600, 800]
    for unit in units:
        assert abs(unit.mean()) < 1e-5 and abs(unit.std() - 1) < 1e-3
