"""HTSAT: a windowed transformer over a spectrogram that is folded into a square.

Legend: ``U`` clips, ``L`` frames, ``V`` views of a clip, ``M`` mel bands, ``R`` rows, ``C`` columns, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, all_valid
from polymodal.models.layers.convolution import valid_mask
from polymodal.models.layers.mlp import Activation
from polymodal.models.layers.windows import PatchMerging, WindowBlock

VIEWS = 4
"""A whole long recording in few frames, and three crops of it."""


class HtsatConfig(EncoderConfig):
    """A windowed transformer (Swin) over log-mel frames, folded so that time chunks stand below one another.

    ``fused`` takes four views of a clip: the whole of a long recording, shrunk to the frames of one clip, and three
    crops, which are mixed into it by attentional feature fusion. A clip whose views are all equal is not long, and
    nothing is mixed.

    Source: HTS-AT, arXiv 2202.00874, section 2; fusion: CLAP, arXiv 2211.06687, section 2.2.
    """

    use: Literal["htsat"] = "htsat"
    modality: ClassVar[str] = "audio"
    num_mels: int = Field(default=16, ge=1)
    """Bands of the log-mel spectrogram."""
    image_size: int = Field(default=64, ge=1)
    """Side of the square that the frames are folded into; a multiple of the bands."""
    patch_size: int = Field(default=4, ge=1)
    """Side of a patch in bands and frames."""
    window: int = Field(default=4, ge=1)
    """Side of a window in patches."""
    depths: tuple[int, ...] = Field(default=(2, 2), min_length=1)
    """Blocks of each stage; between stages the grid is halved and the width doubled, up to ``width``."""
    heads: tuple[int, ...] = (2, 4)
    """Attention heads of each stage."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLPs over the stage's width."""
    activation: Activation = "gelu"
    fused: bool = False
    """Whether a clip comes as four views that are mixed, as said above."""
    fusion_ratio: int = Field(default=4, ge=1)
    """By how much the fusion narrows; for ``fused``."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if len(self.heads) != len(self.depths):
            raise ValueError(f"found {len(self.depths)} depths and {len(self.heads)} heads, expected one per stage")
        halvings = 2 ** (len(self.depths) - 1)
        if self.width % halvings or any(self.stage_width(i) % heads for i, heads in enumerate(self.heads)):
            raise ValueError(
                f"width {self.width} cannot be halved {len(self.depths) - 1} times into multiples of {self.heads}"
            )
        if self.image_size % self.num_mels or self.image_size % (self.patch_size * self.window * halvings):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of num_mels {self.num_mels} and of "
                f"{self.patch_size * self.window * halvings}, a window of the last stage"
            )
        if self.last_grid % self.folds:
            raise ValueError(f"the last grid has {self.last_grid} rows, expected a multiple of the {self.folds} folds")
        return self

    def stage_width(self, stage: int) -> int:
        """Width of one stage."""
        return int(self.width // 2 ** (len(self.depths) - 1 - stage))

    @property
    def folds(self) -> int:
        """Chunks of time that stand below one another."""
        return self.image_size // self.num_mels

    @property
    def last_grid(self) -> int:
        """Side of the last stage's grid."""
        return int(self.image_size // self.patch_size // 2 ** (len(self.depths) - 1))

    @property
    def max_frames(self) -> int:
        """Longest clip; shorter ones are stretched to it."""
        return self.image_size * self.folds

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(num_mels,)``, or ``(4, num_mels)`` if fused."""
        return (VIEWS, self.num_mels) if self.fused else (self.num_mels,)

    def num_features(self, length: int) -> int:
        """All of the last grid."""
        return self.last_grid**2

    def default_reader(self) -> AudioReaderConfig:
        """Decibels of this many bands at 48 kHz; short recordings are repeated to the length of a clip."""
        return AudioReaderConfig(
            rate_hz=48_000,
            num_mels=self.num_mels,
            window_s=1024 / 48_000,
            levels="decibels",
            end_frame=True,
            clip_s=(self.max_frames - 1) * 0.01,
            repeat=True,
            pad_clip=True,
            views=self.fused,
        )

    def build(self) -> Htsat:
        """The module."""
        return Htsat(self)


class Fusion(nn.Module):
    """Attentional feature fusion: a gate, from what two maps have in common, says how much of each is taken.

    Source: arXiv 2009.14082, section 3.2, doubled as in CLAP.

    Args:
        width: channels of both maps.
        ratio: by how much the gate's hidden layer is narrower.
    """

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.local = self._branch(width, width // ratio)
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), *self._branch(width, width // ratio))

    @staticmethod
    def _branch(width: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x_UDRC: Tensor, y_UDRC: Tensor) -> Tensor:
        """Mix two maps of the same shape."""
        both = x_UDRC + y_UDRC
        gate = (self.local(both) + self.whole(both)).sigmoid()
        mixed: Tensor = 2 * x_UDRC * gate + 2 * y_UDRC * (1 - gate)
        return mixed


class PatchEmbedding(nn.Module):
    """Patches of the folded spectrogram, with the crops of long recordings mixed in if the config asks for it.

    Args:
        config: of the encoder.
    """

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        width, patch = config.stage_width(0), config.patch_size
        self.proj = nn.Conv2d(1, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)
        self.crop_proj = nn.Conv2d(1, width, (patch, 3 * patch), stride=(patch, 3 * patch)) if config.fused else None
        self.fusion = Fusion(width, config.fusion_ratio) if config.fused else None

    def forward(self, x_UVRC: Tensor, is_long_U: Tensor) -> Tensor:
        """``[U, V, R, C]`` in pixels to a grid of patches ``[U, R', C', D]``."""
        x_UDRC = self.proj(x_UVRC[:, :1])
        if self.fusion is not None and self.crop_proj is not None and bool(is_long_U.any()):
            rows = is_long_U.nonzero().squeeze(1)
            crops = self.crop_proj(x_UVRC[rows, 1:].flatten(0, 1)[:, None]).unflatten(0, (len(rows), -1))
            crops_UDRC = crops.permute(0, 2, 3, 1, 4).flatten(3)
            crops_UDRC = F.pad(crops_UDRC, (0, x_UDRC.shape[3] - crops_UDRC.shape[3]))
            x_UDRC = x_UDRC.index_copy(0, rows, self.fusion(x_UDRC[rows], crops_UDRC))
        out: Tensor = self.norm(x_UDRC.permute(0, 2, 3, 1))
        return out


class Stage(nn.Module):
    """Blocks on one grid, and the halving to the next.

    Args:
        config: of the encoder.
        stage: which one.
    """

    def __init__(self, config: HtsatConfig, stage: int) -> None:
        super().__init__()
        width = config.stage_width(stage)
        self.blocks = nn.ModuleList(
            WindowBlock(
                width,
                config.heads[stage],
                config.window,
                shift=config.window // 2 if block % 2 else 0,
                mlp_dim=int(config.mlp_ratio * width),
                activation=config.activation,
            )
            for block in range(config.depths[stage])
        )
        self.merge = PatchMerging(width) if stage + 1 < len(config.depths) else None

    def forward(self, x_URCD: Tensor) -> Tensor:
        """Run the stage on a grid."""
        for block in self.blocks:
            x_URCD = block(x_URCD)
        return x_URCD if self.merge is None else self.merge(x_URCD)


class Htsat(Encoder):
    """See :class:`HtsatConfig`."""

    config: HtsatConfig

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        self.config = config
        self.band_norm = nn.BatchNorm1d(config.num_mels)
        self.embedding = PatchEmbedding(config)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.depths)))
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode log-mel frames ``[U, L, M]`` (``[U, L, 4, M]`` if fused); features stand in order of time.

        Raises:
            ConfigError: if a clip has more frames than the square holds.
        """
        self.require_shape(values)
        config = self.config
        if values.shape[1] > config.max_frames:
            raise ConfigError(
                f"htsat: found a clip of {values.shape[1]} frames, expected at most {config.max_frames}; "
                "set the reader's clip_s to what they last"
            )
        views_ULVM = values if config.fused else values[:, :, None]
        is_valid_UL = valid_mask(lengths_U, values.shape[1])
        is_long_U = ((views_ULVM[:, :, :1] != views_ULVM).flatten(2).any(dim=2) & is_valid_UL).any(dim=1)
        x_URCD = self.embedding(self._folded(views_ULVM, lengths_U, is_valid_UL), is_long_U)
        for stage in self.stages:
            x_URCD = stage(x_URCD)
        x_URCD = self.final_norm(x_URCD)
        # Rows are folds of time, and bands within each.
        return all_valid(x_URCD.unflatten(1, (config.folds, -1)).transpose(2, 3).flatten(1, 3))

    def _folded(self, views_ULVM: Tensor, lengths_U: Tensor, is_valid_UL: Tensor) -> Tensor:
        """Normalised bands, stretched to the full length: a square for each view ``[U, V, R, C]``."""
        config = self.config
        # Only valid frames meet the batch statistics.
        frames_KM = self.band_norm(views_ULVM[is_valid_UL].flatten(0, 1))
        frames_KVM = frames_KM.unflatten(0, (-1, views_ULVM.shape[2]))
        units = [
            _stretched(unit.transpose(0, 1)[None], config.max_frames) for unit in frames_KVM.split(lengths_U.tolist())
        ]
        x_UVLM = torch.cat(units)
        return torch.unflatten(x_UVLM, 2, (config.folds, -1)).transpose(3, 4).flatten(2, 3)


def _stretched(x_1VLM: Tensor, length: int) -> Tensor:
    """A unit's frames stretched to ``length``, as the published code does it."""
    if x_1VLM.shape[2] == length:
        return x_1VLM
    return F.interpolate(x_1VLM, (length, x_1VLM.shape[3]), mode="bicubic", align_corners=True)
