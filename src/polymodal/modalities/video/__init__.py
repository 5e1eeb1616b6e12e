"""Moving pictures: header, frames, sampling."""

from polymodal.modalities.video.decode import Frame, Place, clip_indices, decode_frames, iter_frames, spread_indices
from polymodal.modalities.video.header import VideoHeader, probe_video
from polymodal.modalities.video.reader import VideoReader, VideoReaderConfig

__all__ = [
    "Frame",
    "Place",
    "VideoHeader",
    "VideoReader",
    "VideoReaderConfig",
    "clip_indices",
    "decode_frames",
    "iter_frames",
    "probe_video",
    "spread_indices",
]
