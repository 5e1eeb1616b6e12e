from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile import RATE_HZ, encoded_ogg, encoded_sound, encoded_video, float_wav, gif, tone

from polymodal.core.errors import ConfigError, CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Image
from polymodal.modalities.audio import (
    AudioReader,
    AudioReaderConfig,
    decode_audio,
    log_mel,
    mel_filters,
    num_resampled,
    probe_audio,
    resampled,
)
from polymodal.modalities.reader import checked_read

LIMITS = Limits()
SHARED = Path(os.environ.get("POLYMODAL_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
DIGITS = sorted((SHARED / "spoken-digits").glob("*.wav"))
NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * RATE_HZ).astype(np.float32)


def reader(**config: object) -> AudioReader:
    return AudioReader(AudioReaderConfig.parse(config), LIMITS)


def read(part: Audio, **config: object) -> list[np.ndarray]:
    made = reader(**config)
    return checked_read(made, part, made.measure(part)).units


@pytest.mark.parametrize("format", ["WAV", "FLAC", "AIFF"])
def test_lossless_formats_give_the_samples(format: str, tmp_path: Path) -> None:
    path = tmp_path / "tone"
    path.write_bytes(encoded_sound(format))
    for source in (path, str(path), path.read_bytes()):
        wave, rate_hz = decode_audio(Audio(source), LIMITS)
        assert rate_hz == RATE_HZ and wave.dtype == np.float32
        np.testing.assert_allclose(wave, tone(), atol=1e-4)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encoded_ogg("VORBIS"), 0.05),
        (encoded_ogg("OPUS"), 0.05),
        (encoded_sound("MP3"), 0.05),
        (encoded_video("mp4", "libx264", "aac"), 0.05),
        (encoded_video("mp4", "", "aac"), 0.05),
        (encoded_video("webm", "libvpx", "libopus"), 0.05),
        (encoded_video("avi", "mpeg4", "libmp3lame"), 0.2),
    ],
)
def test_lossy_formats_give_the_promised_length(data: bytes, tolerance: float) -> None:
    header = probe_audio(Audio(data), LIMITS)
    wave, rate_hz = decode_audio(Audio(data), LIMITS)
    assert len(wave) == header.num_frames and rate_hz == header.rate_hz
    assert abs(header.duration_s - len(tone(0.5)) / RATE_HZ) < tolerance or abs(header.duration_s - 1) < tolerance
    middle = wave[len(wave) // 4 : -len(wave) // 4]
    strongest = np.abs(np.fft.rfft(middle)).argmax() * rate_hz / len(middle)
    assert abs(strongest - 440) < 5
    assert 0.3 < np.abs(middle).max() < 0.5


def test_mp3_without_a_length_header() -> None:
    data = encoded_sound("MP3")
    assert len(decode_audio(Audio(data), LIMITS)[0]) == len(tone())
    stripped = data[data.index(b"\xff", 200) :]  # the first frame, which holds the length, is lost
    header = probe_audio(Audio(stripped), LIMITS)
    assert len(decode_audio(Audio(stripped), LIMITS)[0]) == header.num_frames


def test_live_recordings_without_a_duration_are_measured_by_their_packets() -> None:
    data = encoded_video("webm", "libvpx", "libopus", live=True)
    header = probe_audio(Audio(data), LIMITS)
    assert abs(header.duration_s - 1) < 0.05
    assert len(decode_audio(Audio(data), LIMITS)[0]) == header.num_frames


def test_channels_are_averaged() -> None:
    stereo = np.stack([tone(), -tone() / 2], axis=1)
    for part in (Audio(stereo, rate_hz=RATE_HZ), Audio(encoded_sound("WAV", None, stereo))):
        assert probe_audio(part, LIMITS).channels == 2
        np.testing.assert_allclose(decode_audio(part, LIMITS)[0], tone() / 4, atol=1e-4)


def test_values_beyond_one_are_clipped() -> None:
    wave, _ = decode_audio(Audio(np.array([0.5, 1.5, -3.0]), rate_hz=8000), LIMITS)
    np.testing.assert_array_equal(wave, [0.5, 1.0, -1.0])


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (Audio(tone()), UnsupportedMediaError, "no sampling rate"),
        (Audio(tone(), rate_hz=0), UnsupportedMediaError, "sampling rate of 0 Hz"),
        (Audio(np.zeros(9, np.int16), rate_hz=8000), UnsupportedMediaError, "divide by 32768"),
        (Audio(np.zeros((2, 2, 2)), rate_hz=8000), UnsupportedMediaError, "channels last"),
        (Audio(np.zeros((2, 500)), rate_hz=8000), LimitError, r"\[T, C\], not \[C, T\]"),
        (Audio(np.zeros(0), rate_hz=8000), CorruptMediaError, "no values"),
        (Audio(np.array([0.0, np.nan]), rate_hz=8000), CorruptMediaError, "NaN"),
        (Audio(np.full(9, 3e4), rate_hz=8000), CorruptMediaError, "reach 30,000"),
        (Audio(encoded_sound("WAV"), rate_hz=8000), UnsupportedMediaError, "header says 16,000 Hz, rate_hz says 8,000"),
        (Audio(float_wav(np.full(9, np.nan))), CorruptMediaError, "NaN"),
        (Audio(b"<!doctype html>"), UnsupportedMediaError, "web page"),
        (Audio(encoded_video("mp4", "libx264")), UnsupportedMediaError, "no audio track"),
        (Audio(gif()), UnsupportedMediaError, "no recording"),
        (Audio("none.wav"), CorruptMediaError, r"none\.wav: cannot be read"),
        (Audio(12), UnsupportedMediaError, "found a int"),
    ],
)
def test_bad_sources(part: Audio, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        decode_audio(part, LIMITS)


def test_limits_are_applied_to_the_header() -> None:
    part = Audio(encoded_sound("FLAC"))
    with pytest.raises(LimitError, match=r"lasts 0\.5 s, the limit \(audio_seconds\) is 0\.4"):
        probe_audio(part, Limits(audio_seconds=0.4))
    with pytest.raises(LimitError, match="audio_channels"):
        probe_audio(Audio(np.zeros((9, 2)), rate_hz=8000), Limits(audio_channels=1))


@pytest.mark.parametrize(
    "data",
    [
        encoded_sound("WAV"), encoded_sound("FLAC"), encoded_ogg("VORBIS"), encoded_ogg("OPUS"), encoded_sound("MP3"),
        encoded_video("mp4", "libx264", "aac"), encoded_video("webm", "libvpx", "libopus"),
    ],
)  # fmt: skip
def test_truncated_files_are_errors(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    for share in (0.2, 0.5, 0.8):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CorruptMediaError, match=r"cut\.bin.*(truncated|damaged)"):
            decode_audio(Audio(path), LIMITS)


def test_wav_of_a_recorder_that_never_closed_it() -> None:
    data = bytearray(encoded_sound("WAV"))
    data[4:8] = data[40:44] = b"\xff" * 4
    assert len(decode_audio(Audio(bytes(data)), LIMITS)[0]) == len(tone())


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.1, 0.5, 3.0])
def test_log_mel_is_that_of_whisper(num_mels: int, seconds: float) -> None:
    whisper = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=num_mels, chunk_length=1)
    wave = NOISE[: int(seconds * RATE_HZ)] * np.linspace(0, 1, int(seconds * RATE_HZ), dtype=np.float32) ** 4
    expected = whisper(wave, sampling_rate=RATE_HZ, padding=False, truncation=False, return_tensors="np")
    units = read(Audio(wave, rate_hz=RATE_HZ), num_mels=num_mels)
    np.testing.assert_allclose(units[0], expected["input_features"][0].T, atol=1e-4)


def test_padded_clips_are_those_of_whisper() -> None:
    whisper = pytest.importorskip("transformers").WhisperFeatureExtractor(chunk_length=2)
    expected = whisper(tone(), sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0].T
    units = read(Audio(tone(), rate_hz=RATE_HZ), clip_s=2.0, pad_clip=True)
    np.testing.assert_allclose(units[0], expected, atol=1e-4)


def test_mel_filters_have_unit_area() -> None:
    filters = mel_filters(20, 4000, 16_000)
    np.testing.assert_allclose(filters.sum(axis=0) * 4.0, 1.0, rtol=0.02)


def test_silence_is_the_floor() -> None:
    levels = log_mel(np.zeros(800, np.float32), mel_filters(20, 400, 16_000), 400, 160)
    assert levels.shape == (5, 20) and (levels == -10).all()


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 4000, 8001])
def test_one_frame_for_every_started_hop(num_samples: int) -> None:
    part = Audio(NOISE[:num_samples], rate_hz=RATE_HZ)
    assert reader().measure(part) == (-(-num_samples // 160),)
    assert np.isfinite(read(part)[0]).all()


@pytest.mark.parametrize("from_hz", [8000, 11_025, 22_050, 44_100, 48_000])
def test_lengths_survive_resampling(from_hz: int) -> None:
    for num_samples in (1, 7, 441, 5003):
        part = Audio(NOISE[:num_samples], rate_hz=from_hz)
        for representation in ("wave", "log_mel"):
            read(part, representation=representation)
        assert len(resampled(NOISE[:num_samples], from_hz, RATE_HZ)) == num_resampled(num_samples, from_hz, RATE_HZ)


def test_resampling_keeps_the_tone() -> None:
    units = read(Audio(tone(0.5, 44_100), rate_hz=44_100), representation="wave")
    assert units[0].shape == (8000, 1)
    np.testing.assert_allclose(units[0][200:-200, 0], tone()[200:-200], atol=2e-3)


def test_clips() -> None:
    part = Audio(NOISE[: int(2.5 * RATE_HZ)], rate_hz=RATE_HZ)
    assert reader(clip_s=1.0).measure(part) == (100, 100, 50)
    assert reader(clip_s=1.0, pad_clip=True).measure(part) == (100, 100, 100)
    assert reader(clip_s=1.0, representation="wave").measure(part) == (16_000, 16_000, 8000)
    waves = read(part, clip_s=1.0, representation="wave")
    np.testing.assert_array_equal(np.concatenate(waves)[:, 0], part.source)
    padded = read(part, clip_s=1.0, representation="wave", pad_clip=True)
    assert not padded[2][8000:].any()


def test_constants_are_applied() -> None:
    part = Audio(tone(), rate_hz=RATE_HZ)
    plain, scaled = read(part, mean=0.0, std=1.0)[0], read(part)[0]
    np.testing.assert_allclose(scaled, (plain + 4) / 4, atol=1e-6)
    wave = read(part, representation="wave", mean=0.5, std=2.0)[0][:, 0]
    np.testing.assert_allclose(wave, (tone() - 0.5) / 2, atol=1e-6)
    other = reader(rate_hz=8000, num_mels=40, window_s=0.05, hop_s=0.02)
    assert other.measure(part) == (25,) and other.unit_shape == (40,)
    assert other.read(part).units[0].shape == (25, 40)


def test_max_s_refuses_and_never_cuts() -> None:
    part = Audio(tone(), rate_hz=RATE_HZ)
    made = reader(max_s=0.4)
    for use in (made.measure, made.read):
        with pytest.raises(LimitError, match=r"lasts 0\.50 s, this reader takes max_s = 0\.40 s"):
            use(part)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_clip": True}, "needs clip_s"),
        ({"num_mels": 200, "window_s": 0.01}, "stay silent"),
        ({"hop_s": 0.00001}, "at least 2 and 1"),
        ({"clip_s": 0.001}, "at least one hop"),
        ({"std": 0}, "greater than 0"),
        ({"representation": "mfcc"}, "'log_mel', 'fbank' or 'wave'"),
        ({"repeat": True}, "repeat needs clip_s"),
        ({"standardise": True}, "standardise is for representation: wave, found log_mel"),
        ({"representation": "wave", "levels": "decibels"}, "levels is for representation: log_mel, found wave"),
        ({"fill_frames": 9}, "fill_frames is for representation: fbank, found log_mel"),
        ({"max_hz": 9000.0}, "the bands reach from 0 to 9000 Hz; expected a range within 0 to 8000"),
        ({"views": True, "clip_s": 1.0}, "views need pad_clip and end_frame"),
        ({"keep_filling": 2}, "keep_filling needs pad_clip"),
    ],
)
def test_wrong_configs(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AudioReaderConfig.parse(config)


def test_other_parts_are_refused() -> None:
    with pytest.raises(UnsupportedMediaError, match="expected 'audio'"):
        reader().measure(Image("a.png"))


@pytest.mark.skipif(not DIGITS, reason="the folder shared/data/spoken-digits is absent")
def test_spoken_digits() -> None:
    for path in DIGITS[::100]:
        unit = read(Audio(path))[0]
        assert unit.shape[1] == 80 and 0.5 <= unit.max() <= 2.0
