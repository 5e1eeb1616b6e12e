"""Any tower of the ``transformers`` library as an encoder: uniform features from whatever it takes and gives.

Legend: ``U`` units, ``N`` features, ``D`` width, ``L`` length of a unit, ``S`` side of an image, ``C`` channels.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.modalities.audio import AudioReaderConfig
from polymodal.modalities.image import ImageReaderConfig
from polymodal.modalities.reader import ReaderConfig
from polymodal.modalities.sensor import SensorReaderConfig
from polymodal.modalities.text import TextReaderConfig
from polymodal.modalities.video import VideoReaderConfig
from polymodal.models.encoders.base import Encoder, EncoderConfig, Features, finish
from polymodal.models.encoders.transformers_tower import TowerFacts, build_tower, inputs_of, probe, tower_class, uniform
from polymodal.models.layers.convolution import valid_mask
from polymodal.models.transformers_library import library_config, loaded_part, set_checkpointing


class TransformersEncoderConfig(EncoderConfig):
    """A tower of the library, computed by the library.

    In a recipe, ``from: FOLDER`` fills in ``config`` and the stream's reader and takes the weights from there. Of a
    checkpoint of several towers, the one of the modality is taken; of an encoder-decoder, the encoder.
    """

    use: Literal["transformers"] = "transformers"
    modality: Literal["image", "video", "audio", "text", "sensor"]  # type: ignore[misc]
    """What it reads."""
    config: dict[str, Any]
    """What ``config.json`` holds."""
    output: str = "last_hidden_state"
    """Which output of the tower the features are; for ``layer`` -1."""
    layer: int = Field(default=-1, le=-1)
    """Which hidden state gives the features: -1 is ``output``, -2 the state before the last block, and so on."""
    skip: int = Field(default=0, ge=0)
    """Leading tokens that are no features (a class token, distillation tokens)."""
    pool: Literal["own", "mean", "first"] | None = None
    """The pooled vector: the tower's ``own``, the ``mean`` of the features, or the ``first`` token, skipped or not.
    None: its own where it has one of the same width, else the mean."""
    size_px: int | None = Field(default=None, ge=1)
    """Side of images and frames; None: what the config names."""
    length: int | None = Field(default=None, ge=1)
    """The one length of a unit (frames, spectrogram frames, samples, rows) that the tower takes; None: what the config
    names, or any. Shorter units are filled up: a video with its last frame, others with zeros."""
    facts: TowerFacts
    """What a run without weights found out; filled in where it is not given."""

    @model_validator(mode="before")
    @classmethod
    def _probe(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            return data
        if data.get("facts") is None:
            keys = ("modality", "config", "output", "layer", "skip", "pool", "size_px", "length")
            data = {**data, "facts": probe(**{key: data[key] for key in keys if key in data})}
        facts = TowerFacts.parse(data["facts"])
        return {**data, "facts": facts, "width": facts.width}

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of one unit without its ragged axis."""
        return self.facts.unit_shape

    def num_features(self, length: int) -> int:
        """The one number of a tower with units of one length; else what its strides give, at least one."""
        return self.facts.count(length)

    def default_reader(self) -> ReaderConfig:
        """Units of the tower's shape; the normalisation is the checkpoint's, which only ``from`` knows."""
        facts = self.facts
        if self.modality == "image":
            return ImageReaderConfig(size_px=facts.unit_shape[-1])
        if self.modality == "video":
            frames = {} if facts.length is None else {"num_frames": facts.length}
            return VideoReaderConfig(size_px=facts.unit_shape[-1], **frames)
        if self.modality == "audio" and facts.form == "wave":
            return AudioReaderConfig(representation="wave")
        if self.modality == "audio":
            clip = {} if facts.length is None else {"clip_s": facts.length / 100, "pad_clip": True}
            return AudioReaderConfig.parse({"num_mels": facts.unit_shape[0], **clip})
        if self.modality == "sensor":
            return SensorReaderConfig(num_channels=facts.unit_shape[0])
        longest = self.config.get("max_position_embeddings")
        return TextReaderConfig() if longest is None else TextReaderConfig(max_tokens=min(int(longest), 512))

    def build(self) -> TransformersEncoder:
        """The module."""
        return TransformersEncoder(self)


class TransformersEncoder(Encoder):
    """See :class:`TransformersEncoderConfig`."""

    config: TransformersEncoderConfig

    def __init__(self, config: TransformersEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Any = build_tower(config.config)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed anew in the backward pass."""
        return bool(self.model.is_activation_checkpointing)

    @checkpointing.setter
    def checkpointing(self, is_on: bool) -> None:
        set_checkpointing(self.model, is_on)

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode units; those of a ragged modality in groups of equal length, so that padding is never seen."""
        facts, is_ragged = self.config.facts, self.config.modality != "image"
        self.require_shape(values, ragged=is_ragged)
        if not is_ragged or facts.length is not None:
            return self._group(self._filled(values, lengths_U) if is_ragged else values)
        lengths = lengths_U.tolist()
        counts = torch.tensor([facts.count(length) for length in lengths], device=values.device)
        x_UND = pooled_UD = None
        for length in sorted(set(lengths)):
            index = torch.tensor([row for row, own in enumerate(lengths) if own == length], device=values.device)
            part = self._group(self._filled(values[index, :length], None))
            if x_UND is None or pooled_UD is None:
                x_UND = part.x_UND.new_zeros(len(lengths), int(counts.max()), part.x_UND.shape[2])
                pooled_UD = part.pooled_UD.new_zeros(len(lengths), part.pooled_UD.shape[1])
            x_UND = x_UND.index_put((index[:, None], torch.arange(part.x_UND.shape[1])[None]), part.x_UND)
            pooled_UD = pooled_UD.index_copy(0, index, part.pooled_UD)
        assert x_UND is not None
        return finish(x_UND, valid_mask(counts, x_UND.shape[1]), pooled_UD)

    def _group(self, values: Tensor) -> Features:
        """Units of one length."""
        config, facts = self.config, self.config.facts
        options = {"output_hidden_states": True} if config.layer != -1 else {}
        output = self.model(**inputs_of(facts, self.model, values), return_dict=True, **options)
        x_UTD = uniform(output, config.output, config.layer, facts.axes)
        x_UND = x_UTD[:, config.skip :]
        if facts.pool == "own":
            pooled_UD: Tensor = output["pooler_output"].flatten(1)
        else:
            pooled_UD = x_UTD[:, 0] if facts.pool == "first" else x_UND.mean(dim=1)
        is_valid_UN = torch.ones(x_UND.shape[:2], dtype=torch.bool, device=x_UND.device)
        return Features(x_UND, is_valid_UN, pooled_UD)

    def _filled(self, values: Tensor, lengths_U: Tensor | None) -> Tensor:
        """Units brought to the tower's length, or to the least that gives a feature."""
        facts = self.config.facts
        wanted = facts.length or facts.least
        if values.shape[1] > wanted and facts.length is not None:
            raise ConfigError(
                f"{self.config.config.get('model_type')}: found a unit of length {values.shape[1]}, this tower takes "
                f"{wanted}; set the reader's num_frames, clip_s or window_s to it"
            )
        if values.shape[1] < wanted:
            missing = wanted - values.shape[1]
            values = torch.cat((values, values.new_zeros(len(values), missing, *values.shape[2:])), dim=1)
        if self.config.modality == "video" and lengths_U is not None:
            slot_UL = torch.minimum(torch.arange(values.shape[1], device=values.device), lengths_U[:, None] - 1)
            values = values[torch.arange(len(values), device=values.device)[:, None], slot_UL]
        return values

    def load_folder(self, folder: str | os.PathLike[str]) -> None:
        """Take the weights of a checkpoint folder.

        Raises:
            CheckpointError: if the folder does not hold them.
        """
        device = next(self.parameters()).device
        own = library_config(self.config.config)

        def loader() -> Any:
            auto, pick = tower_class(own)
            model, info = auto.from_pretrained(
                folder, config=own, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
            return pick(model), info["missing_keys"]

        unused = () if self.config.facts.pool == "own" else ("pooler.", "decoder.")
        model = loaded_part(loader, str(folder), unused)
        self.model = model.to(device) if device.type != "meta" else model
