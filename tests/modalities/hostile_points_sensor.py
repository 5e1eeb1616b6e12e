"""Small valid files of every points and sensor format, to be read, mutated and imported.

``WRITERS`` lists ``(modality, extension, writer)``; a writer takes nothing and returns the bytes of one file.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np

NUM_POINTS = 40
NUM_ROWS = 50
RATE_HZ = 50.0
CHANNELS = ("ax", "ay", "az")


def cloud() -> tuple[np.ndarray, np.ndarray]:
    """xyz float32 [40, 3] and rgb uint8 [40, 3]."""
    rng = np.random.default_rng(7)
    return rng.normal(size=(NUM_POINTS, 3)).astype(np.float32), rng.integers(0, 256, (NUM_POINTS, 3)).astype(np.uint8)


def motion() -> np.ndarray:
    """float32 [50, 3]."""
    return np.random.default_rng(8).normal(size=(NUM_ROWS, 3)).astype(np.float32)


def ply_header(format: str, count: int, colour: str = "uchar") -> str:
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    colours = "".join(f"property {colour} {name}\n" for name in ("red", "green", "blue")) if colour else ""
    face = "element face 0\nproperty list uchar int vertex_indices\n"
    return (
        f"ply\nformat {format} 1.0\ncomment made for tests\nelement vertex {count}\n{axes}{colours}{face}end_header\n"
    )


def ply_binary(order: str = "<", colour: str = "uchar", count: int = NUM_POINTS) -> bytes:
    xyz, rgb = cloud()
    kind = {"uchar": "u1", "float": order + "f4", "ushort": order + "u2"}.get(colour)
    layout = [(axis, order + "f4") for axis in "xyz"] + ([(name, kind) for name in "rgb"] if kind else [])
    rows = np.zeros(NUM_POINTS, layout)
    for i, axis in enumerate("xyz"):
        rows[axis] = xyz[:, i]
    scale = {"uchar": 1, "float": 1 / 255, "ushort": 257}.get(colour, 0)
    for i, name in enumerate("rgb" if kind else ""):
        rows[name] = rgb[:, i].astype(np.float64) * scale
    format = "binary_little_endian" if order == "<" else "binary_big_endian"
    return ply_header(format, count, colour).encode() + rows.tobytes()


def ply_big() -> bytes:
    return ply_binary(">")


def ply_ascii(count: int = NUM_POINTS) -> bytes:
    xyz, rgb = cloud()
    lines = [" ".join([*(repr(float(v)) for v in p), *(str(int(c)) for c in q)]) for p, q in zip(xyz, rgb, strict=True)]
    return (ply_header("ascii", count) + "\n".join(lines) + "\n").encode()


def obj() -> bytes:
    xyz, rgb = cloud()
    lines = [
        f"v {' '.join(repr(float(v)) for v in p)} {' '.join(f'{c / 255:.6f}' for c in q)}"
        for p, q in zip(xyz, rgb, strict=True)
    ]
    return ("# made for tests\nmtllib none.mtl\n" + "\n".join(lines) + "\nvn 0 0 1\nf 1 2 3\n").encode()


def xyz_text() -> bytes:
    xyz, rgb = cloud()
    lines = [" ".join([*(repr(float(v)) for v in p), *(str(int(c)) for c in q)]) for p, q in zip(xyz, rgb, strict=True)]
    return ("# x y z r g b\n" + "\n".join(lines) + "\n").encode()


def npy_points() -> bytes:
    xyz, rgb = cloud()
    return npy(np.concatenate([xyz, rgb / np.float32(255)], axis=1))


def las(version: str = "1.2", point_format: int = 3, suffix: str = "las", eight_bit: bool = False) -> bytes:
    import laspy

    xyz, rgb = cloud()
    header = laspy.LasHeader(point_format=point_format, version=version)
    header.scales, header.offsets = np.full(3, 1e-4), np.array([500_000.0, 4_000_000.0, 100.0])
    data = laspy.LasData(header)
    data.x, data.y, data.z = (xyz[:, i].astype(np.float64) + header.offsets[i] for i in range(3))
    if point_format in (2, 3, 5, 7, 8, 10):
        scale = 1 if eight_bit else 257
        data.red, data.green, data.blue = (rgb[:, i].astype(np.uint16) * scale for i in range(3))
    file = io.BytesIO()
    data.write(file, do_compress=suffix == "laz")
    return file.getvalue()


def laz() -> bytes:
    return las("1.4", 7, "laz")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def csv_motion(time: bool = True, newline: str = "\n") -> bytes:
    rows = motion()
    header = ",".join((["time"] if time else []) + list(CHANNELS))
    lines = [
        ",".join(([f"{i / RATE_HZ:.6f}"] if time else []) + [repr(float(v)) for v in r]) for i, r in enumerate(rows)
    ]
    return newline.join([header, *lines, ""]).encode()


def csv_stated() -> bytes:
    return b"# rate_hz: 50\n" + csv_motion(time=False)


def parquet(time: bool = True, rate_hz: float | None = None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = motion()
    columns = {"time": np.arange(NUM_ROWS) / RATE_HZ} if time else {}
    table = pa.table(columns | {name: rows[:, i] for i, name in enumerate(CHANNELS)})
    if rate_hz is not None:
        table = table.replace_schema_metadata({"rate_hz": str(rate_hz)})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def npy_motion() -> bytes:
    return npy(motion())


WRITERS: list[tuple[str, str, Callable[[], bytes]]] = [
    ("points", ".ply", ply_binary),
    ("points", ".ply", ply_big),
    ("points", ".ply", ply_ascii),
    ("points", ".obj", obj),
    ("points", ".xyz", xyz_text),
    ("points", ".npy", npy_points),
    ("points", ".las", las),
    ("points", ".laz", laz),
    ("sensor", ".csv", csv_motion),
    ("sensor", ".csv", csv_stated),
    ("sensor", ".parquet", parquet),
    ("sensor", ".npy", npy_motion),
]


def mutations(data: bytes, seed: int = 0) -> list[tuple[str, bytes]]:
    """Named damaged copies: cut, bytes flipped, zeroed, empty, random, repeated."""
    rng = np.random.default_rng(seed)
    result = [("empty", b""), ("zeros", bytes(len(data))), ("random", rng.bytes(len(data))), ("twice", data + data)]
    for share in (0.02, 0.1, 0.3, 0.5, 0.9, 0.99):
        result.append((f"cut at {share}", data[: int(len(data) * share)]))
    for count in (1, 1, 1, 1, 2, 4, 16, 64):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), count)
        damaged[places] = rng.integers(0, 256, count)
        result.append((f"flip {count} at {int(places[0])}", damaged.tobytes()))
    for start in rng.integers(0, max(len(data) - 16, 1), 3):
        damaged = bytearray(data)
        damaged[start : start + 16] = bytes(16)
        result.append((f"zero at {int(start)}", bytes(damaged)))
    for place in rng.integers(0, min(len(data), 400), 12):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        result.append((f"header flip at {int(place)}", bytes(damaged)))
    return result
