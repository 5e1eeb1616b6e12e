from __future__ import annotations

import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hostile_points_sensor as seeds

from polymodal.core.config import Config
from polymodal.core.errors import (
    ConfigError,
    CorruptMediaError,
    LimitError,
    MediaError,
    MissingExtraError,
    UnsupportedMediaError,
)
from polymodal.core.limits import Limits
from polymodal.core.parts import Points
from polymodal.modalities.points import PointsReader, PointsReaderConfig, decode_points, probe_points
from polymodal.modalities.points.sampling import farthest_points
from polymodal.modalities.reader import checked_read

LIMITS = Limits()
WRITERS = [(ext, writer) for modality, ext, writer in seeds.WRITERS if modality == "points"]


@pytest.mark.parametrize(("extension", "writer"), WRITERS, ids=[w.__name__ for _, w in WRITERS])
@pytest.mark.parametrize("as_path", [True, False])
def test_every_format_gives_the_cloud_that_was_written(extension, writer, as_path, tmp_path):
    xyz, rgb = seeds.cloud()
    data = writer()
    part = Points(data)
    if as_path:
        path = tmp_path / f"cloud{extension}"
        path.write_bytes(data)
        part = Points(path)
    header = probe_points(part, LIMITS)
    found_xyz, found_rgb = decode_points(part, LIMITS)
    assert (header.num_points, header.has_colour) == (40, True)
    assert found_xyz.dtype == found_rgb.dtype == np.float32
    if extension in (".las", ".laz"):
        xyz = xyz + np.float64([500_000, 4_000_000, 100])
    np.testing.assert_allclose(found_xyz, xyz, atol=0.3 if extension in (".las", ".laz") else 1e-6)
    np.testing.assert_allclose(found_rgb, rgb / 255, atol=1e-5)


@pytest.mark.parametrize("colour", ["float", "ushort", ""])
@pytest.mark.parametrize("order", ["<", ">"])
def test_ply_colour_types(colour, order):
    xyz, rgb = seeds.cloud()
    found_xyz, found_rgb = decode_points(Points(seeds.ply_binary(order, colour)), LIMITS)
    np.testing.assert_array_equal(found_xyz, xyz)
    if colour:
        np.testing.assert_allclose(found_rgb, rgb / 255, atol=1e-6)
    else:
        assert found_rgb is None


def test_ply_elements_before_the_vertices_are_skipped():
    head = "ply\nformat {} 1.0\nelement camera 2\nproperty double f\nelement vertex 1\n"
    head += "property int y\nproperty int x\nproperty int z\nend_header\n"
    binary = head.format("binary_little_endian").encode() + struct.pack("<2d3i", 9, 9, 2, 1, 3)
    text = (head.format("ascii") + "9\n9\n2 1 3").encode()
    for data in (binary, text):
        assert decode_points(Points(data), LIMITS)[0].tolist() == [[1, 2, 3]]


def test_las_agrees_with_laspy_and_reads_every_point_format():
    xyz, _ = seeds.cloud()
    for version, point_format in [("1.2", 0), ("1.2", 2), ("1.3", 5), ("1.4", 6), ("1.4", 7), ("1.4", 10)]:
        part = Points(seeds.las(version, point_format))
        reader = PointsReader(PointsReaderConfig(colour=False, normalise="unit_sphere"), LIMITS)
        centred = xyz - xyz.astype(np.float64).mean(axis=0)
        expected = centred / np.linalg.norm(centred, axis=1).max()
        # Coordinates of 4,000,000 keep the file's 0.1 mm steps, because centring happens in float64.
        np.testing.assert_allclose(reader.read(part).units[0], expected, atol=2e-4)
        assert probe_points(part, LIMITS).has_colour == (point_format not in (0, 6))


def test_las_with_eight_bit_colours():
    _, rgb = seeds.cloud()
    np.testing.assert_allclose(decode_points(Points(seeds.las(eight_bit=True)), LIMITS)[1], rgb / 255, atol=1e-6)


def test_obj_and_xyz_without_colour():
    for data in (b"v 1 2 3\nv 4 5 6\nf 1 2 1\n", b"o thing\nv 1 2 3 1.0\nv 4 5 6 1.0\n", b"1 2 3\n\n4 5 6"):
        xyz, rgb = decode_points(Points(data), LIMITS)
        assert xyz.tolist() == [[1, 2, 3], [4, 5, 6]] and rgb is None


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (b"", CorruptMediaError, "empty"),
        (np.zeros((0, 3)), CorruptMediaError, "no points"),
        (np.zeros((4, 5)), UnsupportedMediaError, r"shape \(4, 5\); expected \[N, 3\]"),
        (np.array([[0, 0, 0], [np.nan, 0, 0]]), CorruptMediaError, "1 of 2 points are NaN.*point 2"),
        (np.array([[1e30, 0, 0]]), CorruptMediaError, r"coordinate of 1e\+30"),
        (np.array([[0, 0, 0, 0.1, 0.2, 7]]), CorruptMediaError, r"colour \[0.1, 0.2, 7.0\]; expected values in 0..1"),
        (b"1 2 3\n4 5\n", CorruptMediaError, "columns changed from 3 to 2 in data row 2"),
        (b"1 2 3\n4 x 6\n", CorruptMediaError, "'x'.*in data row 2"),
        (b"1 2 3 4\n", UnsupportedMediaError, "rows hold 4 numbers"),
        (b"# nothing\n", CorruptMediaError, "no points"),
        (b"o thing\nf 1 2 3\n", CorruptMediaError, "no points"),
        (b"v 1 2\n", UnsupportedMediaError, "vertices hold 2 numbers"),
        (b"ply\nformat ascii 1.0\n", CorruptMediaError, "no PLY header"),
        (b"ply\nelement vertex 1\nproperty float x\nend_header\n", CorruptMediaError, "no 'format' line"),
        (b"ply\nformat ascii 1.0\nelement face 1\nend_header\n", CorruptMediaError, "no element 'vertex'"),
        (b"ply\nformat ascii 1.0\nelement vertex -1\nend_header\n", CorruptMediaError, "line 'element vertex -1'"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1",
            CorruptMediaError,
            "hold .'x'.;",
        ),
        (seeds.ply_binary()[:-1], CorruptMediaError, "promises 40 vertices"),
        (seeds.ply_ascii(41), CorruptMediaError, "40 data rows, the header promises 41"),
        (seeds.las()[:-1], CorruptMediaError, "LAS header promises 40 points"),
        (seeds.las()[:100], CorruptMediaError, "LAS header is cut"),
        (seeds.npy_points()[:-1], CorruptMediaError, r"promises shape \(40, 6\)"),
        (seeds.npy(np.array([["a"]])), UnsupportedMediaError, "expected integers or floats"),
    ],
)
def test_errors_say_what_was_found(source, kind, message):
    with pytest.raises(kind, match=message):
        decode_points(Points(source), LIMITS)


def test_errors_about_lists_and_names(tmp_path):
    listed = b"ply\nformat binary_little_endian 1.0\nelement face 1\nproperty list uchar int i\nelement vertex 1\n"
    listed += b"property float x\nproperty float y\nproperty float z\nend_header\n" + bytes(30)
    with pytest.raises(UnsupportedMediaError, match="expected vertices first"):
        decode_points(Points(listed), LIMITS)
    vertex = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
    with pytest.raises(UnsupportedMediaError, match="list properties"):
        decode_points(Points(vertex + b"property list uchar int i\nend_header\n1 2 3 0\n"), LIMITS)
    (tmp_path / "a.ply").write_bytes(b"hello there")
    with pytest.raises(CorruptMediaError, match=r"is called .ply, but begins with b'hello th'"):
        probe_points(Points(tmp_path / "a.ply"), LIMITS)
    with pytest.raises(CorruptMediaError, match=r"gone.ply: cannot be read"):
        probe_points(Points(tmp_path / "gone.ply"), LIMITS)
    pickled = np.empty(1, object)
    with pytest.raises(UnsupportedMediaError, match="object"):
        decode_points(Points(seeds.npy(pickled)), LIMITS)


def test_limits_are_checked_from_the_header():
    for claimed in (seeds.ply_binary(count=10**12), seeds.ply_ascii(10**12)):
        with pytest.raises(LimitError, match=r"1,000,000,000,000 points, the limit \(points\) is 50,000,000"):
            decode_points(Points(claimed), LIMITS)
    for _, writer in WRITERS:
        with pytest.raises(LimitError, match="40 points, the limit"):
            probe_points(Points(writer()), Limits(points=39))
    las = bytearray(seeds.las("1.4", 7))
    las[247:255] = struct.pack("<Q", 10**12)
    with pytest.raises(MediaError, match="1,000,000,000,000 points"):
        probe_points(Points(bytes(las)), LIMITS)
    npy = seeds.npy_points().replace(b"(40, 6), }" + b" " * 10, b"(1000000000000, 6), }"[:20])
    with pytest.raises(MediaError):
        probe_points(Points(npy), LIMITS)


@pytest.mark.parametrize(("extension", "writer"), WRITERS, ids=[w.__name__ for _, w in WRITERS])
def test_every_mutation_gives_finite_points_or_a_media_error(extension, writer, tmp_path):
    reader = PointsReader(PointsReaderConfig(num_points=16), LIMITS)
    for name, data in seeds.mutations(writer()):
        path = tmp_path / f"x{extension}"
        path.write_bytes(data)
        for part in (Points(path), Points(data)):
            try:
                unit = checked_read(reader, part, reader.measure(part)).units[0]
            except MediaError as error:
                assert len(str(error)) > 20, name
            else:
                assert np.isfinite(unit).all() and unit.shape[1] == 6, name


@pytest.mark.parametrize("num_points", [16, 64])
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("sampling", ["farthest", "random"])
def test_reader_keeps_its_promise(num_points, colour, sampling):
    config = PointsReaderConfig(num_points=num_points, colour=colour, sampling=sampling)
    reader = PointsReader(config, LIMITS)
    part = Points(seeds.ply_binary())
    lengths = reader.measure(part)
    result = checked_read(reader, part, lengths)
    assert lengths == (min(40, num_points),)
    assert result.units[0].shape == (*lengths, *reader.unit_shape) and result.units[0].dtype == np.float32
    again = PointsReader(config, LIMITS).read(Points(seeds.ply_ascii())).units[0]
    np.testing.assert_array_equal(result.units[0], again)  # The same cloud in another file: the same points.
    radius = np.linalg.norm(result.units[0][:, :3], axis=1)
    assert radius.max() == pytest.approx(1) and np.abs(result.units[0][:, :3].mean(axis=0)).max() < 1e-6


def test_no_colour_is_neutral_grey_and_none_keeps_coordinates():
    xyz, _ = seeds.cloud()
    unit = PointsReader(PointsReaderConfig(normalise="none"), LIMITS).read(Points(xyz)).units[0]
    np.testing.assert_array_equal(unit[:, :3], xyz)
    assert (unit[:, 3:] == 0.5).all()
    single = PointsReader(PointsReaderConfig(), LIMITS).read(Points(np.ones((1, 3)))).units[0]
    assert single[:, :3].tolist() == [[0, 0, 0]]


def test_farthest_points_agree_with_the_definition_and_are_fast():
    xyz = np.random.default_rng(0).normal(size=(100, 3))
    chosen = farthest_points(xyz, 20)
    for step in range(1, 20):
        distance = np.linalg.norm(xyz[:, None] - xyz[chosen[:step]], axis=2).min(axis=1)
        assert distance[chosen[step]] == pytest.approx(distance.max())
    assert len(set(farthest_points(np.zeros((50, 3)), 20).tolist())) == 20  # Duplicates are never taken twice.
    large = np.random.default_rng(1).normal(size=(200_000, 3))
    assert len(set(farthest_points(large, 512).tolist())) == 512
    start = time.perf_counter()
    farthest_points(np.random.default_rng(2).normal(size=(2048, 3)), 512)
    assert time.perf_counter() - start < 0.5


def test_config_round_trip_and_refusal():
    config = PointsReaderConfig(num_points=7)
    assert isinstance(config, Config) and PointsReaderConfig.parse(config.to_data()) == config
    with pytest.raises(ConfigError, match="num_points"):
        PointsReaderConfig.parse({"num_points": 0})


def test_laz_without_its_package_says_what_to_install(monkeypatch):
    data = seeds.laz()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"LAZ files needs the package 'lazrs'.*polymodal\[points\]"):
        decode_points(Points(data), LIMITS)
