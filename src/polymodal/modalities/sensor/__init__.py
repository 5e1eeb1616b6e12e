"""Sensor recordings: CSV, Parquet, NPY and arrays -> float32 ``[T, C]`` with a rate and channel names."""

from polymodal.modalities.sensor.decode import SensorHeader, decode_sensor, probe_sensor
from polymodal.modalities.sensor.reader import SensorReader, SensorReaderConfig

__all__ = ["SensorHeader", "SensorReader", "SensorReaderConfig", "decode_sensor", "probe_sensor"]
