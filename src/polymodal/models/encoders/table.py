"""Every encoder by name."""

from __future__ import annotations

from polymodal.core.config import Table
from polymodal.models.encoders.audio_conv1d import AudioConv1dConfig
from polymodal.models.encoders.audio_transformer import AudioTransformerConfig
from polymodal.models.encoders.base import EncoderConfig
from polymodal.models.encoders.cnn import CnnConfig
from polymodal.models.encoders.cnn_temporal import CnnTemporalConfig
from polymodal.models.encoders.frame_temporal import FrameTemporalConfig
from polymodal.models.encoders.point_groups import PointGroupsConfig
from polymodal.models.encoders.pointnet import PointnetConfig
from polymodal.models.encoders.sensor_patch import SensorPatchConfig
from polymodal.models.encoders.spectrum import SpectrumConfig
from polymodal.models.encoders.tcn import TcnConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.encoders.tubelet import TubeletConfig
from polymodal.models.encoders.vit import VitConfig

ENCODERS: Table[EncoderConfig] = Table(
    "encoder",
    [
        VitConfig,
        CnnConfig,
        AudioTransformerConfig,
        AudioConv1dConfig,
        FrameTemporalConfig,
        TubeletConfig,
        CnnTemporalConfig,
        PointGroupsConfig,
        PointnetConfig,
        SensorPatchConfig,
        TcnConfig,
        SpectrumConfig,
        TextTransformerConfig,
    ],
)
"""Every encoder config by name."""
