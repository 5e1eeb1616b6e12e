from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile import encoded_video, gif, picture

from polymodal.core.errors import ConfigError, CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Video
from polymodal.modalities.reader import checked_read
from polymodal.modalities.video import VideoReader, VideoReaderConfig, decode_frames, probe_video, spread_indices

LIMITS = Limits()
MP4 = encoded_video("mp4", "libx264", "aac")
CLIPS = {
    "mp4": MP4,
    "mov": encoded_video("mov", "libx264"),
    "webm": encoded_video("webm", "libvpx", "libopus"),
    "webm-vp9": encoded_video("webm", "libvpx-vp9"),
    "webm-live": encoded_video("webm", "libvpx", live=True),
    "mkv": encoded_video("matroska", "libx264"),
    "avi": encoded_video("avi", "mpeg4"),
}
FRAMES = np.stack([np.full((6, 8, 3), 20 * i, np.uint8) for i in range(10)])


def reader(**config: object) -> VideoReader:
    return VideoReader(VideoReaderConfig.parse({"size_px": 16, **config}), LIMITS)


def read(part: Video, **config: object) -> np.ndarray:
    made = reader(**config)
    item = checked_read(made, part, made.measure(part))
    assert len(item.units) == 1
    return item.units[0]


@pytest.mark.parametrize("kind", CLIPS)
def test_containers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a:b.bin"  # neither a protocol nor the extension may matter
    path.write_bytes(CLIPS[kind])
    for source in (path, CLIPS[kind]):
        header = probe_video(Video(source), LIMITS)
        assert (header.num_frames, header.width_px, header.height_px) == (10, 64, 48)
        assert header.fps == pytest.approx(10, rel=0.02)
        pixels, times = decode_frames(Video(source), LIMITS, indices=[1, 9, 4, 4])
        assert pixels.shape == (4, 48, 64, 3) and pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels.mean(axis=(1, 2, 3)), [20, 180, 80, 80], atol=4)
        np.testing.assert_allclose(times, [0.1, 0.9, 0.4, 0.4], atol=0.002)


def test_gif() -> None:
    header = probe_video(Video(gif(6)), LIMITS)
    assert header.num_frames == 6 and header.duration_s == pytest.approx(0.48)
    pixels, times = decode_frames(Video(gif(6)), LIMITS)
    np.testing.assert_allclose(times, np.arange(6) * 0.08)
    for i in range(6):
        assert np.abs(pixels[i].astype(int) - np.roll(picture(), 9 * i, axis=1)).mean() < 8


def test_arrays() -> None:
    pixels, times = decode_frames(Video(FRAMES, fps=5), LIMITS, num_frames=2)
    np.testing.assert_array_equal(pixels, FRAMES[[2, 7]])
    np.testing.assert_allclose(times, [0.4, 1.4])


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_is_undone(degrees: int) -> None:
    data = encoded_video("mp4", "libx264", rotation=degrees)
    pixels, _ = decode_frames(Video(data), LIMITS, indices=[3])
    assert pixels.shape[1:3] == ((64, 48) if degrees % 180 else (48, 64))


def test_rotation_turns_counter_clockwise(tmp_path: Path) -> None:
    import av

    path = tmp_path / "turned.mp4"
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, 32:] = 255  # stored: white on the right; turned by 90 degrees counter-clockwise: white on top
    with av.open(str(path), "w") as out:
        track = out.add_stream("libx264", rate=10)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        track.set_display_rotation(90)
        out.mux(track.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        out.mux(track.encode(None))
    pixels, _ = decode_frames(Video(path), LIMITS)
    assert pixels[0, :20].mean() > 200 > 50 > pixels[0, -20:].mean()


def test_spread_indices() -> None:
    assert spread_indices(16, 4) == (2, 6, 10, 14)
    assert spread_indices(3, 8) == (0, 1, 2)
    assert spread_indices(1, 1) == (0,)
    for available in range(1, 40):
        for wanted in range(1, 40):
            indices = spread_indices(available, wanted)
            assert len(set(indices)) == len(indices) == min(available, wanted)
            assert sorted(indices) == list(indices) and indices[-1] < available


def test_uniform_sampling() -> None:
    unit = read(Video(FRAMES, fps=10), num_frames=5, mean=[0, 0, 0], std=[1, 1, 1])
    assert unit.shape == (5, 3, 16, 16) and unit.dtype == np.float32
    np.testing.assert_allclose(unit[:, 0, 0, 0] * 255, [20, 60, 100, 140, 180], atol=0.01)
    assert read(Video(FRAMES, fps=10), num_frames=50).shape[0] == 10


def test_fps_sampling() -> None:
    config = {"sampling": "fps", "sample_fps": 2.0, "max_frames": 6}
    assert read(Video(FRAMES, fps=5), **config).shape[0] == 4
    assert read(Video(FRAMES, fps=1), **config).shape[0] == 6
    assert read(Video(FRAMES, fps=100), **config).shape[0] == 1


def test_resize_and_constants() -> None:
    white = np.full((2, 8, 16, 3), 255, np.uint8)
    padded = read(Video(white, fps=1), resize="pad")
    assert padded[0, 0, 0, 8] == 0 and padded[0, 0, 8, 8] == 1
    cropped = read(Video(white, fps=1), resize="crop", mean=[0.5, 0, 0], std=[0.5, 1, 0.5])
    np.testing.assert_allclose(cropped[0, :, 8, 8], [1, 1, 2], atol=1e-6)
    assert reader().unit_shape == (3, 16, 16) and reader().is_ragged


def test_a_header_that_counts_two_frames_too_many_is_forgiven() -> None:
    place = CLIPS["avi"].index(b"strh") + 8 + 32
    assert int.from_bytes(CLIPS["avi"][place : place + 4], "little") == 10
    for count, is_read in ((12, True), (40, False)):
        data = CLIPS["avi"][:place] + count.to_bytes(4, "little") + CLIPS["avi"][place + 4 :]
        stated = probe_video(Video(data), LIMITS).num_frames
        if stated == 10:
            pytest.skip("this FFmpeg counts the frames of an AVI by its index")
        if is_read:
            assert decode_frames(Video(data), LIMITS)[0].shape[0] == 12
        else:
            with pytest.raises(CorruptMediaError, match="promises 40 frames, the content has 10"):
                decode_frames(Video(data), LIMITS)


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv", "avi", "gif"])
def test_truncated_files_are_errors(kind: str, tmp_path: Path) -> None:
    data = CLIPS.get(kind) or gif()
    path = tmp_path / "cut.bin"
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CorruptMediaError, match=r"cut\.bin.*(truncated|damaged)"):
            probe_video(Video(path), LIMITS)


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (Video(FRAMES), UnsupportedMediaError, "no frame rate"),
        (Video(FRAMES, fps=0), CorruptMediaError, "0 frames per second"),
        (Video(FRAMES, fps=float("nan")), CorruptMediaError, "nan frames per second"),
        (Video(FRAMES / 255, fps=5), UnsupportedMediaError, "multiply by 255"),
        (Video(FRAMES.transpose(0, 3, 1, 2), fps=5), UnsupportedMediaError, "channels last"),
        (Video(FRAMES[:0], fps=5), CorruptMediaError, "no values"),
        (Video(MP4, fps=50), UnsupportedMediaError, "header says 10.000 frames per second, fps says 50.000"),
        (Video(encoded_video("mp4", "", "aac")), UnsupportedMediaError, "no video track"),
        (Video(b"#EXTM3U\nfile:///etc/passwd\n"), UnsupportedMediaError, "no video that can be read"),
        (Video(b"<html>"), UnsupportedMediaError, "web page"),
        (Video("none.mp4"), CorruptMediaError, r"none\.mp4: cannot be read"),
        (Video(None), UnsupportedMediaError, "found a NoneType"),
    ],
)
def test_bad_sources(part: Video, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        probe_video(part, LIMITS)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"video_pixels": 100}, "video_pixels"),
        ({"video_frames": 5}, "video_frames"),
        ({"video_seconds": 0.3}, "video_seconds"),
        ({"file_bytes": 10}, "file_bytes"),
    ],
)
def test_limits_are_applied_to_the_header(limits: dict, message: str) -> None:
    for data in (MP4, gif()):
        with pytest.raises(LimitError, match=message):
            probe_video(Video(data), Limits(**limits))


def test_wrong_choices_of_frames() -> None:
    for choice in ({"indices": [10]}, {"indices": [-1]}, {"indices": []}):
        with pytest.raises(ValueError, match=r"expected some in 0\.\.9"):
            decode_frames(Video(FRAMES, fps=5), LIMITS, **choice)
    with pytest.raises(ValueError, match="not both"):
        decode_frames(Video(FRAMES, fps=5), LIMITS, indices=[1], num_frames=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"std": [1, 1, -1]}, "three positive"), ({"num_frames": 0}, "num_frames"), ({"sampling": "random"}, "'uniform'")],
)
def test_wrong_configs(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoReaderConfig.parse(config)


def test_other_parts_are_refused() -> None:
    with pytest.raises(UnsupportedMediaError, match="expected 'video'"):
        reader().measure(Audio("a.wav"))


def test_frames_stand_where_they_are_asked_for() -> None:
    from polymodal.modalities.video import clip_indices

    assert spread_indices(16, 4, "start") == (0, 4, 8, 12) and spread_indices(16, 4, "ends") == (0, 5, 10, 15)
    assert spread_indices(9, 1, "ends") == (4,) and spread_indices(2, 5, "start") == (0, 1)
    # 16 x 4 of the middle; a shorter video is read more densely, none of its frames twice.
    assert clip_indices(20, 4, 3) == (5, 8, 11, 14) and clip_indices(100, 16, 4)[0] == 19
    assert clip_indices(5, 4, 3) == (0, 1, 2, 3) and clip_indices(3, 4, 3) == (0, 1, 2)
    assert clip_indices(1, 4, 3) == (0,)
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    options = {"size_px": 4, "num_frames": 4, "mean": (0.0,) * 3, "std": (1.0,) * 3, "rescale": 1.0}
    cases = (({"sampling": "clip", "frame_stride": 3}, (5, 8, 11, 14)), ({"place": "ends"}, (0, 6, 12, 19)))
    for more, expected in cases:
        reader = VideoReader(VideoReaderConfig(**options, **more), Limits())
        assert reader.measure(Video(frames, fps=5)) == (4,)
        assert tuple(reader.read(Video(frames, fps=5)).units[0][:, 0, 0, 0]) == expected


def test_frames_are_cut_from_a_larger_scaled_one() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 12, 20, 3), dtype=np.uint8)
    config = VideoReaderConfig(size_px=6, num_frames=1, resize="crop", shortest_edge_px=12)
    found = VideoReader(config, Limits()).read(Video(frames, fps=1)).units[0][0]
    np.testing.assert_allclose(found, (frames[0, 3:9, 7:13].transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)
    with pytest.raises(ConfigError, match="shortest_edge_px 4 belongs to resize: crop and is at least size_px 6"):
        VideoReaderConfig.parse({"size_px": 6, "resize": "crop", "shortest_edge_px": 4})
