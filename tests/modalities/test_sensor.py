from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hostile_points_sensor as seeds

from polymodal.core.errors import (
    ConfigError,
    CorruptMediaError,
    LimitError,
    MediaError,
    MissingExtraError,
    UnsupportedMediaError,
)
from polymodal.core.limits import Limits
from polymodal.core.parts import Sensor
from polymodal.modalities.reader import checked_read
from polymodal.modalities.sensor import SensorReader, SensorReaderConfig, decode_sensor, probe_sensor

LIMITS = Limits()
WRITERS = [(ext, writer) for modality, ext, writer in seeds.WRITERS if modality == "sensor"]


def sensor(source, extension: str) -> Sensor:
    details = {"rate_hz": 50.0, "channels": seeds.CHANNELS} if extension == ".npy" else {}
    return Sensor(source, **details)


def reader(**fields) -> SensorReader:
    return SensorReader(SensorReaderConfig(**fields), LIMITS)


@pytest.mark.parametrize(("extension", "writer"), WRITERS, ids=[w.__name__ for _, w in WRITERS])
@pytest.mark.parametrize("as_path", [True, False])
def test_every_format_gives_the_recording_that_was_written(extension, writer, as_path, tmp_path):
    path = tmp_path / f"motion{extension}"
    path.write_bytes(writer())
    part = sensor(path if as_path else writer(), extension)
    header = probe_sensor(part, LIMITS)
    values, rate_hz, channels = decode_sensor(part, LIMITS)
    assert (header.num_rows, header.num_channels, header.channels) == (50, 3, seeds.CHANNELS)
    assert rate_hz == header.rate_hz == pytest.approx(50) and channels == seeds.CHANNELS
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, seeds.motion(), rtol=1e-6)


def test_other_ways_to_write_the_same():
    bom, windows = b"\xef\xbb\xbf" + seeds.csv_motion(), seeds.csv_motion(newline="\r\n")
    blank, unended = seeds.csv_motion().replace(b"\n", b"\n\n"), seeds.csv_motion().rstrip()
    quoted = seeds.csv_motion().replace(b"ax,ay,az", b'"ax","ay",az').replace(b"time", b"Timestamp")
    for data in (bom, windows, blank, unended, quoted, seeds.parquet(time=False, rate_hz=50.0)):
        values, rate_hz, channels = decode_sensor(Sensor(data), LIMITS)
        np.testing.assert_allclose(values, seeds.motion(), rtol=1e-6)
        assert rate_hz == pytest.approx(50) and channels == seeds.CHANNELS
    values, _, channels = decode_sensor(Sensor(np.arange(5, dtype=np.int16), rate_hz=10), LIMITS)
    assert values.tolist() == [[0], [1], [2], [3], [4]] and channels is None


ROWS = "time,a\n0.0,1\n0.1,2\n0.2,3\n0.3,4\n"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", CorruptMediaError, "empty"),
        ("time,a\n", CorruptMediaError, "no data rows"),
        ("1,2\n3,4\n", CorruptMediaError, "expected channel names"),
        ("a,a\n3,4\n", CorruptMediaError, "distinct"),
        ("a,b\n3,4\n", UnsupportedMediaError, "no time column.*give rate_hz"),
        ("time\n0\n1\n", CorruptMediaError, "2 rows of 0 channels"),
        ("time,a\n0,1\n", CorruptMediaError, "at least two rows"),
        (ROWS.replace("0.1,2", "0.1,2,5"), CorruptMediaError, "columns changed from 2 to 3 in data row 2"),
        (ROWS.replace("0.1,2", "0.1"), CorruptMediaError, "columns changed from 2 to 1 in data row 2"),
        (ROWS.replace("0.1,2", "0.1,"), CorruptMediaError, "could not convert.*in data row 2"),
        (ROWS.replace("0.1,2", "0.1,nan"), CorruptMediaError, r"1 of 4 data rows.*data row 2: \[nan\]"),
        (ROWS.replace("0.1,2", "0.1,inf"), CorruptMediaError, r"data row 2: \[inf\]"),
        (ROWS.replace("0.1,", "0.0,"), CorruptMediaError, "data row 2 repeats the one before"),
        (ROWS.replace("0.2,", "0.05,"), CorruptMediaError, "data row 3 is earlier"),
        (ROWS.replace("0.1,", "0.12,"), CorruptMediaError, "step before data row 2 is 0.12 s, the mean is 0.1 s"),
        (ROWS.replace("0.1,", "nan,"), CorruptMediaError, "time in data row 2 is not a finite"),
        (ROWS.replace("0.3,", "zero,"), CorruptMediaError, "time in data row 4 is 'zero'"),
        (ROWS.replace("0.3,", "0.0,"), CorruptMediaError, "goes from 0.0 s to 0.0 s"),
        ("# rate_hz: 20\n" + ROWS, CorruptMediaError, "shows 10 Hz, but 20 Hz is stated"),
        ("# rate_hz: fast\n" + ROWS, CorruptMediaError, "'fast'; expected a finite number"),
        ("# rate_hz: -1\na\n1\n", CorruptMediaError, "a rate of -1.0 Hz"),
        ("t\u00e4".encode("latin-1"), CorruptMediaError, "no data rows"),
        ("\u00e4,t\n0,0\n0,1\n".encode("latin-1"), CorruptMediaError, "not UTF-8"),
    ],
)
def test_csv_errors_say_the_row(text, kind, message):
    with pytest.raises(kind, match=message):
        decode_sensor(Sensor(text if isinstance(text, bytes) else text.encode()), LIMITS)


def test_errors_of_arrays_and_details(tmp_path):
    for part, kind, message in [
        (Sensor(np.zeros((5, 2))), UnsupportedMediaError, "give rate_hz"),
        (Sensor(np.zeros((5, 2)), rate_hz=0), CorruptMediaError, "a rate of 0 Hz"),
        (Sensor(np.zeros((5, 2)), rate_hz=float("nan")), CorruptMediaError, "a rate of nan"),
        (Sensor(np.zeros((0, 2)), rate_hz=1), CorruptMediaError, "0 rows of 2 channels"),
        (Sensor(np.zeros((2, 2, 2)), rate_hz=1), UnsupportedMediaError, r"expected \[T, C\]"),
        (Sensor(np.zeros((2, 2), bool), rate_hz=1), UnsupportedMediaError, "an array of bool"),
        (Sensor(np.zeros((2, 2)), rate_hz=1, channels=("a",)), CorruptMediaError, "2 columns, but the part names"),
        (Sensor(ROWS.encode(), rate_hz=20), CorruptMediaError, "shows 10 Hz, but 20 Hz is stated"),
        (Sensor(ROWS.encode(), channels=("b",)), CorruptMediaError, r"names channels \['a'\], the part \['b'\]"),
        (Sensor(b"# rate_hz: 10\na\n1\n2\n", rate_hz=20), CorruptMediaError, "Hz is stated"),
        (Sensor(seeds.npy_motion()), UnsupportedMediaError, "give rate_hz"),
    ]:
        with pytest.raises(kind, match=message):
            decode_sensor(part, LIMITS)
    (tmp_path / "a.parquet").write_bytes(b"time,a\n")
    with pytest.raises(CorruptMediaError, match=r"is called .parquet, but begins"):
        probe_sensor(Sensor(tmp_path / "a.parquet"), LIMITS)


def test_limits_are_checked_from_the_header():
    for extension, writer in WRITERS:
        part = sensor(writer(), extension)
        with pytest.raises(LimitError, match=r"50 rows, the limit \(sensor_rows\) is 49"):
            probe_sensor(part, Limits(sensor_rows=49))
        with pytest.raises(LimitError, match=r"3 channels, the limit \(sensor_channels\) is 2"):
            probe_sensor(part, Limits(sensor_channels=2))
    with pytest.raises(LimitError, match="rows at 1e"):
        reader(num_channels=2, rate_hz=1e8).measure(Sensor(np.zeros((50, 2)), rate_hz=1))


@pytest.mark.parametrize(("extension", "writer"), WRITERS, ids=[w.__name__ for _, w in WRITERS])
def test_every_mutation_gives_finite_values_or_a_media_error(extension, writer, tmp_path):
    taken = reader(num_channels=3, rate_hz=40.0)
    for name, data in seeds.mutations(writer()):
        path = tmp_path / f"x{extension}"
        path.write_bytes(data)
        for part in (sensor(path, extension), sensor(data, extension)):
            try:
                unit = checked_read(taken, part, taken.measure(part)).units[0]
            except MediaError as error:
                assert len(str(error)) > 20, name
            else:
                assert np.isfinite(unit).all() and unit.shape[1] == 3, name


@pytest.mark.parametrize("rate_hz", [None, 50.0, 20.0, 33.0, 200.0])
@pytest.mark.parametrize("window_s", [None, 0.3, 5.0])
def test_reader_keeps_its_promise(rate_hz, window_s):
    taken = reader(num_channels=3, rate_hz=rate_hz, window_s=window_s)
    part = Sensor(seeds.csv_motion())
    lengths = taken.measure(part)
    result = checked_read(taken, part, lengths)
    assert [unit.shape for unit in result.units] == [(length, 3) for length in lengths] and min(lengths) > 0
    if window_s is not None:
        assert set(lengths[:-1]) <= {round(window_s * (rate_hz or 50))}
    assert sum(lengths) == {None: 50, 50.0: 50, 20.0: 20, 33.0: 33, 200.0: 197}[rate_hz]


def test_resampling_interpolates():
    part = Sensor(np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), rate_hz=10)
    unit = reader(num_channels=2, rate_hz=20).read(part).units[0]
    np.testing.assert_allclose(unit, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]], atol=1e-6)
    one = reader(num_channels=2, rate_hz=20).read(Sensor(np.ones((1, 2)), rate_hz=10)).units[0]
    assert one.tolist() == [[1, 1]]


def test_channels_are_taken_by_name():
    part = Sensor(seeds.csv_motion())
    taken = reader(channels=("az", "ax"))
    np.testing.assert_allclose(taken.read(part).units[0], seeds.motion()[:, [2, 0]], rtol=1e-6)
    assert taken.unit_shape == (2,) and reader().unit_shape == (6,)
    with pytest.raises(UnsupportedMediaError, match=r"lacks the channels \['gx'\]; found \['ax', 'ay', 'az'\]"):
        reader(channels=("ax", "gx")).measure(part)
    with pytest.raises(UnsupportedMediaError, match=r"3 channels \['ax', 'ay', 'az'\]; this reader takes 6"):
        reader().measure(part)
    with pytest.raises(UnsupportedMediaError, match="have no names"):
        reader(channels=("ax",)).measure(Sensor(np.zeros((5, 1)), rate_hz=5))
    with pytest.raises(LimitError, match="lasts 1 s, the reader's limit"):
        reader(num_channels=3, max_s=0.5).measure(part)


def test_normalisation():
    part, values = Sensor(seeds.csv_motion()), seeds.motion()
    stated = reader(num_channels=3, normalise="stated", mean=(1, 2, 3), std=(2, 2, 4)).read(part).units[0]
    np.testing.assert_allclose(stated, (values - [1, 2, 3]) / [2, 2, 4], rtol=1e-4, atol=1e-6)
    item = reader(num_channels=3, normalise="item").read(part).units[0]
    np.testing.assert_allclose(item.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(item.std(axis=0), 1, atol=1e-5)
    flat = reader(num_channels=1, normalise="item").read(Sensor(np.full((4, 1), 7.0), rate_hz=1)).units[0]
    assert flat.tolist() == [[0]] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": []}, "at least one"),
        ({"channels": ["a", "a"]}, "distinct"),
        ({"channels": ["a"], "num_channels": 2}, "num_channels is 2, but 1"),
        ({"mean": [1.0]}, "mean goes together with normalise"),
        ({"num_channels": 1, "normalise": "stated", "mean": [1.0]}, "std goes together"),
        ({"num_channels": 2, "normalise": "stated", "mean": [1.0], "std": [1.0]}, "1 values for 2 channels"),
        ({"rate_hz": 0}, "rate_hz"),
    ],
)
def test_config_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        SensorReaderConfig.parse(fields)


def test_config_round_trip():
    config = SensorReaderConfig(channels=("a", "b"), rate_hz=10, normalise="stated", mean=(0, 0), std=(1, 1))
    assert SensorReaderConfig.parse(config.to_data()) == config


def test_parquet_without_its_package_says_what_to_install(monkeypatch):
    data = seeds.parquet()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"Parquet files needs the package 'pyarrow'.*polymodal\[data\]"):
        probe_sensor(Sensor(data), LIMITS)
