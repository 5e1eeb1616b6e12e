"""Every encoder by name."""

from __future__ import annotations

from polymodal.core.config import Table
from polymodal.models.encoders.audio_conv1d import AudioConv1dConfig
from polymodal.models.encoders.audio_transformer import AudioTransformerConfig
from polymodal.models.encoders.base import EncoderConfig
from polymodal.models.encoders.bind import BindAudioConfig, BindImageConfig, BindSensorConfig, BindVideoConfig
from polymodal.models.encoders.cnn import CnnConfig
from polymodal.models.encoders.cnn_temporal import CnnTemporalConfig
from polymodal.models.encoders.dvae import DvaeConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.frame_temporal import FrameTemporalConfig
from polymodal.models.encoders.htsat import HtsatConfig
from polymodal.models.encoders.i3d import I3dConfig
from polymodal.models.encoders.patches import PatchesConfig
from polymodal.models.encoders.patchtst import PatchtstConfig
from polymodal.models.encoders.pixels import PixelsConfig
from polymodal.models.encoders.point_groups import PointGroupsConfig
from polymodal.models.encoders.pointnet import PointnetConfig
from polymodal.models.encoders.pointnet_aligned import PointnetAlignedConfig
from polymodal.models.encoders.quantised import QuantisedConfig
from polymodal.models.encoders.resnet import ResnetConfig
from polymodal.models.encoders.sensor_patch import SensorPatchConfig
from polymodal.models.encoders.space_time import SpaceTimeConfig
from polymodal.models.encoders.spectrum import SpectrumConfig
from polymodal.models.encoders.tcn import TcnConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.encoders.transformers_encoder import TransformersEncoderConfig
from polymodal.models.encoders.tubelet import TubeletConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.encoders.vit_frames import VitFramesConfig
from polymodal.models.encoders.wav2vec2 import Wav2Vec2Config
from polymodal.models.encoders.whisper import WhisperConfig
from polymodal.models.encoders.whisper_pooled import WhisperPooledConfig

ENCODERS: Table[EncoderConfig] = Table(
    "encoder",
    [
        VitConfig,
        PatchesConfig,
        DvaeConfig,
        QuantisedConfig,
        CnnConfig,
        ResnetConfig,
        AudioTransformerConfig,
        AudioConv1dConfig,
        Wav2Vec2Config,
        HtsatConfig,
        WhisperPooledConfig,
        BindImageConfig,
        BindVideoConfig,
        BindAudioConfig,
        BindSensorConfig,
        WhisperConfig,
        FrameTemporalConfig,
        VitFramesConfig,
        TubeletConfig,
        CnnTemporalConfig,
        PointGroupsConfig,
        PointnetConfig,
        SensorPatchConfig,
        TcnConfig,
        SpectrumConfig,
        TextTransformerConfig,
        EmbeddingConfig,
        SpaceTimeConfig,
        TransformersEncoderConfig,
        PatchtstConfig,
        I3dConfig,
        PointnetAlignedConfig,
        PixelsConfig,
    ],
)
"""Every encoder config by name."""
