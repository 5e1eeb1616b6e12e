"""Point clouds: PLY, OBJ, LAS/LAZ, XYZ, NPY and arrays -> float32 ``[N, 3]`` or ``[N, 6]``."""

from polymodal.modalities.points.decode import PointsHeader, decode_points, probe_points
from polymodal.modalities.points.reader import PointsReader, PointsReaderConfig

__all__ = ["PointsHeader", "PointsReader", "PointsReaderConfig", "decode_points", "probe_points"]
