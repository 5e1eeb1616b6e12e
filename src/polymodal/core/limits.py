"""The one table of limits on media that come in. Every reader takes it; every field can be configured."""

from polymodal.core.config import Config


class Limits(Config):
    """Upper bounds per media item; what is above is refused by name, before it is decoded where possible.

    A recipe (``limits: {image_pixels: 1000000}``) or a caller may replace any of them.
    """

    file_bytes: int = 2 * 1024**3
    """Bytes of one file, or of one in-memory blob."""
    image_pixels: int = 100_000_000
    """Width x height of one image, from the header (decompression bombs stop here)."""
    image_side_px: int = 65_500
    """Longer side of one image."""
    audio_seconds: float = 3_600.0
    """Duration of one recording."""
    audio_channels: int = 64
    """Channels of one recording."""
    video_seconds: float = 7_200.0
    """Duration of one video."""
    video_frames: int = 1_000_000
    """Frames of one video."""
    video_pixels: int = 33_177_600
    """Width x height of one frame (8K)."""
    points: int = 50_000_000
    """Points (or vertices) of one cloud."""
    sensor_rows: int = 50_000_000
    """Rows (time steps) of one sensor recording."""
    sensor_channels: int = 1_024
    """Channels of one sensor recording."""
    text_chars: int = 10_000_000
    """Characters of one text part."""
