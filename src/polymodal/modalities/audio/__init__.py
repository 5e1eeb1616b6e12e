"""Sound: header, samples, log-mel spectrograms."""

from polymodal.modalities.audio.decode import decode_audio
from polymodal.modalities.audio.header import AudioHeader, probe_audio
from polymodal.modalities.audio.mel import log_mel, mel_filters, num_mel_frames
from polymodal.modalities.audio.reader import AudioReader, num_resampled, resampled
from polymodal.modalities.audio.reader_config import AudioReaderConfig

__all__ = [
    "AudioHeader",
    "AudioReader",
    "AudioReaderConfig",
    "decode_audio",
    "log_mel",
    "mel_filters",
    "num_mel_frames",
    "num_resampled",
    "probe_audio",
    "resampled",
]
