"""One trunk for every modality: patches of anything, a class token, learned positions, a transformer.

Legend: ``U`` units, ``L`` length of a unit, ``N`` patches, ``T`` tokens (class token and patches), ``D`` width,
``S`` side of an image.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.modalities.image import ImageReaderConfig
from polymodal.modalities.sensor import SensorReaderConfig
from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, all_valid, finish
from polymodal.models.layers import Layout, LearnedPositions, Transformer, TransformerConfig, initialise
from polymodal.models.layers.convolution import shortened, valid_mask


class BindFields(TransformerEncoderConfig, ABC):
    """What the trunks of all modalities have in common.

    The class token's last state, normalised, is the pooled vector; it is no feature.

    Source: ImageBind, arXiv 2305.05665, section 3.2 and its published code.
    """

    stem_norm: bool = False
    """Whether patches are normalised before positions are added (all but images and videos)."""
    embed_norm: bool = False
    """Whether tokens are normalised before the first block (images and videos)."""
    extra_key: bool = False
    """Whether every token also attends to one learned key and value (all but images, videos and texts)."""
    norm_eps: float = Field(default=1e-6, gt=0)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        return super().stack(depth, final_norm).model_copy(update={"extra_key": self.extra_key})


class BindTrunk(nn.Module):
    """Patches to features and the class token's state.

    Args:
        config: of the encoder.
        num_patches: positions besides the class token's.
    """

    def __init__(self, config: BindFields, num_patches: int) -> None:
        super().__init__()
        self.stem_norm = nn.LayerNorm(config.width) if config.stem_norm else None
        self.cls_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.positions = LearnedPositions(num_patches + 1, config.width)
        self.embed_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.embed_norm else None
        self.transformer = Transformer(config.stack())

    def forward(self, x_UND: Tensor, is_valid_UN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[U, N, D]`` to features of the same shape and pooled ``[U, D]``."""
        if self.stem_norm is not None:
            x_UND = self.stem_norm(x_UND)
        x_UTD = torch.cat((self.cls_token.expand(len(x_UND), 1, -1), x_UND), dim=1)
        x_UTD = x_UTD + self.positions.first(x_UTD.shape[1])
        if self.embed_norm is not None:
            x_UTD = self.embed_norm(x_UTD)
        is_valid_UT = None if is_valid_UN is None else F.pad(is_valid_UN, (1, 0), value=True)
        x_UTD = self.transformer(x_UTD, Layout.padded(is_valid_UT, causal=False))
        return x_UTD[:, 1:], x_UTD[:, 0]


class BindVisionFields(BindFields, ABC):
    """Images and clips of frames share their patches."""

    image_size: int = Field(default=64, ge=1)
    """Side of a square picture in pixels."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch in pixels."""
    frames: int = Field(default=1, ge=1)
    """Frames of a patch; a single picture is shown so often."""
    channels: Literal[1, 3] = 3
    """3 colours; 1: the mean of the picture's three (depth, heat: pictures that are grey)."""

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)


class BindVision(nn.Module):
    """Patches of pictures or of clips, and the trunk over them.

    Args:
        config: of the encoder.
    """

    def __init__(self, config: BindVisionFields) -> None:
        super().__init__()
        self.config = config
        shape = (config.width, config.channels, config.frames, config.patch_size, config.patch_size)
        self.patch_weight = nn.Parameter(torch.randn(shape) * math.prod(shape[1:]) ** -0.5)
        self.trunk = BindTrunk(config, config.grid**2)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Clips ``[U, frames, 3, S, S]``, or pictures ``[U, 3, S, S]``, to features and pooled vectors."""
        config = self.config
        if config.channels == 1:
            clips = clips.mean(dim=-3, keepdim=True)
        stride = config.patch_size
        if clips.ndim == 4:
            # The same picture in every frame: the weights of the frames add up.
            x_UDYX = F.conv2d(clips, self.patch_weight.sum(dim=2), stride=stride)
        else:
            x_UDYX = F.conv3d(clips.transpose(1, 2), self.patch_weight, stride=(config.frames, stride, stride))
        out: tuple[Tensor, Tensor] = self.trunk(x_UDYX.flatten(2).transpose(1, 2))
        return out


class BindImageConfig(BindVisionFields):
    """A picture, or one of another sensor: depth, heat. Source: ImageBind, arXiv 2305.05665, section 3.2."""

    use: Literal["bind_image"] = "bind_image"
    modality: ClassVar[str] = "image"

    def num_features(self, length: int) -> int:
        """One per patch."""
        return self.grid**2

    def default_reader(self) -> ImageReaderConfig:
        """Pictures of this size."""
        return ImageReaderConfig(size_px=self.image_size)

    def build(self) -> BindImage:
        """The module."""
        return BindImage(self)


class BindImage(Encoder):
    """See :class:`BindImageConfig`."""

    def __init__(self, config: BindImageConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = BindVision(config)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode pictures ``[U, 3, S, S]``."""
        self.require_shape(values, ragged=False)
        return all_valid(*self.trunk(values))


class BindVideoConfig(BindVisionFields):
    """Clips of ``frames`` frames, each alone; the pooled vector is the mean of theirs.

    An incomplete last clip repeats its last frame.

    Source: ImageBind, arXiv 2305.05665, section 3.2 (two frames of two seconds).
    """

    use: Literal["bind_video"] = "bind_video"
    modality: ClassVar[str] = "video"
    frames: int = Field(default=2, ge=1)
    """Frames of a clip and of a patch."""
    num_clips: int = Field(default=1, ge=1)
    """Clips that the default reader takes; the encoder itself takes any number."""

    def num_features(self, length: int) -> int:
        """One per patch of each clip, clip by clip."""
        return shortened(length, self.frames) * self.grid**2

    def default_reader(self) -> VideoReaderConfig:
        """Frames of this size."""
        return VideoReaderConfig(num_frames=self.num_clips * self.frames, size_px=self.image_size)

    def build(self) -> BindVideo:
        """The module."""
        return BindVideo(self)


class BindVideo(Encoder):
    """See :class:`BindVideoConfig`; its ``trunk`` may be an image encoder's (``shares``)."""

    config: BindVideoConfig

    def __init__(self, config: BindVideoConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = BindVision(config)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, 3, S, S]``."""
        self.require_shape(values)
        frames = self.config.frames
        num_units, num_clips = len(values), shortened(values.shape[1], frames)
        place_L = torch.arange(num_clips * frames, device=values.device)
        place_UL = torch.minimum(place_L, lengths_U[:, None] - 1)
        clips = values[torch.arange(num_units, device=values.device)[:, None], place_UL]
        is_valid_UC = valid_mask((lengths_U + frames - 1) // frames, num_clips)
        clips = torch.unflatten(clips, 1, (num_clips, frames))
        x_BND, pooled_BD = self.trunk(clips[is_valid_UC])
        x_UCND = x_BND.new_zeros(num_units, num_clips, *x_BND.shape[1:])
        x_UCND[is_valid_UC] = x_BND
        pooled_UCD = pooled_BD.new_zeros(num_units, num_clips, pooled_BD.shape[1])
        pooled_UCD[is_valid_UC] = pooled_BD
        pooled_UD = pooled_UCD.sum(dim=1) / is_valid_UC.sum(dim=1, keepdim=True)
        is_valid_UN = is_valid_UC.repeat_interleave(x_BND.shape[1], dim=1)
        return finish(x_UCND.flatten(1, 2), is_valid_UN, pooled_UD)


class BindAudioConfig(BindFields):
    """Overlapping square patches of a spectrogram of fixed length; shorter ones are completed with zeros.

    Source: ImageBind, arXiv 2305.05665, section 3.2 (2 s at 16 kHz as 128 bands of 204 frames, stride 10), after AST,
    arXiv 2104.01778, section 2.1.
    """

    use: Literal["bind_audio"] = "bind_audio"
    modality: ClassVar[str] = "audio"
    num_mels: int = Field(default=32, ge=1)
    """Bands of the spectrogram."""
    num_frames: int = Field(default=64, ge=1)
    """Frames of a clip."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch, in bands and frames."""
    stride: int = Field(default=10, ge=1)
    """Distance of patches along both axes."""

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.patch_size > min(self.num_mels, self.num_frames):
            raise ValueError(
                f"patch_size {self.patch_size} is above {self.num_mels} bands or {self.num_frames} frames; lower it"
            )
        return self

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``."""
        return (self.num_mels,)

    def num_features(self, length: int) -> int:
        """All patches of a full clip."""
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in (self.num_mels, self.num_frames))
        return rows * columns

    def default_reader(self) -> AudioReaderConfig:
        """Kaldi's filter banks at 16 kHz, normalised by AudioSet's mean and deviation."""
        # A clip's frames lie within it, so that the last window begins before the last hops.
        clip_s = max(1, self.num_frames - 4) * 0.01
        return AudioReaderConfig(
            representation="fbank",
            num_mels=self.num_mels,
            clip_s=clip_s,
            fill_frames=self.num_frames,
            mean=-4.268,
            std=9.138,
        )

    def build(self) -> BindAudio:
        """The module."""
        return BindAudio(self)


class BindAudio(Encoder):
    """See :class:`BindAudioConfig`."""

    config: BindAudioConfig

    def __init__(self, config: BindAudioConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(1, config.width, config.patch_size, config.stride, bias=False)
        self.trunk = BindTrunk(config, config.num_features(config.num_frames))

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode frames ``[U, L, M]``.

        Raises:
            ConfigError: if a clip has more frames than the positions.
        """
        self.require_shape(values)
        missing = self.config.num_frames - values.shape[1]
        if missing < 0:
            raise ConfigError(
                f"bind_audio: found a clip of {values.shape[1]} frames, expected at most {self.config.num_frames}; "
                "set the reader's clip_s to what they last"
            )
        values = F.pad(values * valid_mask(lengths_U, values.shape[1])[..., None], (0, 0, 0, missing))
        x_UDYX = self.patch_embed(values.transpose(1, 2)[:, None])
        return all_valid(*self.trunk(x_UDYX.flatten(2).transpose(1, 2)))


class BindSensorConfig(BindFields):
    """Runs of samples of all channels, each as one patch; an incomplete last run is completed with zeros.

    Source: ImageBind, arXiv 2305.05665, section 3.2 (six channels, 2,000 samples in runs of 8).
    """

    use: Literal["bind_sensor"] = "bind_sensor"
    modality: ClassVar[str] = "sensor"
    num_channels: int = Field(default=6, ge=1)
    """Channels of the recordings."""
    num_samples: int = Field(default=256, ge=1)
    """Longest window."""
    patch_size: int = Field(default=8, ge=1)
    """Samples of a run."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_channels,)``."""
        return (self.num_channels,)

    def num_features(self, length: int) -> int:
        """One per run that begins within the window.

        Raises:
            ConfigError: if the window is longer than the positions reach.
        """
        if length > self.num_samples:
            raise ConfigError(
                f"bind_sensor: found a window of {length} samples, expected at most {self.num_samples}; "
                "set the reader's window_s"
            )
        return shortened(length, self.patch_size)

    def default_reader(self) -> SensorReaderConfig:
        """Recordings of this many channels."""
        return SensorReaderConfig(num_channels=self.num_channels)

    def build(self) -> BindSensor:
        """The module."""
        return BindSensor(self)


class BindSensor(Encoder):
    """See :class:`BindSensorConfig`."""

    config: BindSensorConfig

    def __init__(self, config: BindSensorConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_proj = nn.Linear(config.num_channels * config.patch_size, config.width, bias=False)
        initialise(self.patch_proj, 1)
        self.trunk = BindTrunk(config, shortened(config.num_samples, config.patch_size))

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode windows ``[U, L, C]``."""
        self.require_shape(values)
        num, patch = self.config.num_features(values.shape[1]), self.config.patch_size
        values = values * valid_mask(lengths_U, values.shape[1])[..., None]
        values = F.pad(values, (0, 0, 0, num * patch - values.shape[1]))
        # Channel by channel within a run, as the published weights have it.
        x_UND = self.patch_proj(torch.unflatten(values, 1, (num, patch)).transpose(2, 3).flatten(2))
        is_valid_UN = valid_mask((lengths_U + patch - 1) // patch, num)
        x_UND, pooled_UD = self.trunk(x_UND, is_valid_UN)
        return finish(x_UND, is_valid_UN, pooled_UD)
