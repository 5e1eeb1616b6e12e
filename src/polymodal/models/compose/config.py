"""The declarative form of a model: streams, backbone, heads, tokenizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from polymodal.core.config import Config, unknown
from polymodal.core.parts import MODALITIES
from polymodal.modalities.table import READERS
from polymodal.models.backbones.table import BACKBONES, MergeConfig, NoBackboneConfig
from polymodal.models.connectors.table import CONNECTORS
from polymodal.models.encoders.table import ENCODERS
from polymodal.models.entries.fusions import FUSIONS
from polymodal.models.entries.table import ENTRIES, MergeEntry, SequenceEntry
from polymodal.models.heads.table import HEADS

_BACKBONE_OF = {
    "sequence": "decoder",
    "next_token": "decoder",
    "merge": "merge",
    "class": "merge",
    "matching": "merge",
}
"""The backbone that an entry or a head needs; those that are not here go with any."""


class TokenizerConfig(Config):
    """Where the tokenizer comes from: trained on the recipe's text (``bpe``), or a ``tokenizer.json``."""

    use: Literal["bpe", "file"] = "bpe"
    vocab_size: PositiveInt = 1024
    """Ids in all, for ``bpe``; the trained tokenizer may have fewer where the text has fewer merges."""
    path: str | None = None
    """The ``tokenizer.json``, for ``file``."""

    @model_validator(mode="after")
    def _has_path(self) -> TokenizerConfig:
        if (self.use == "file") != (self.path is not None):
            raise ValueError("'path' belongs to use: file, and use: file needs it")
        return self


class StreamConfig(Config):
    """A named path into the model: one modality, one encoder, one connector, and how it enters."""

    modality: str
    encoder: ENCODERS.field()  # type: ignore[valid-type]
    reader: READERS.field() | None = None  # type: ignore[valid-type]
    """Preprocessing; None derives it from the encoder."""
    connector: CONNECTORS.field() | None = None  # type: ignore[valid-type]
    """None: none is needed (streams that enter nothing), or linear."""
    enters: ENTRIES.field() = Field(default_factory=lambda: ENTRIES.parse("none"))  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Derive what is not said, so that the resolved recipe shows it."""
        if not isinstance(data, dict) or "encoder" not in data:
            return data
        data = dict(data)
        encoder = ENCODERS.parse(data["encoder"])
        data["encoder"] = encoder
        if data.get("reader") is None:
            data["reader"] = encoder.default_reader()
        entry = ENTRIES.parse(data.get("enters", "none"))
        if data.get("connector") is None and entry.use != "none":
            data["connector"] = CONNECTORS.parse("linear")
        return data

    @model_validator(mode="after")
    def _agree(self) -> StreamConfig:
        if self.modality not in MODALITIES:
            raise ValueError(unknown("modality", self.modality, MODALITIES))
        for kind, part in (("encoder", self.encoder), ("reader", self.reader)):
            if part is not None and part.modality != self.modality:
                raise ValueError(f"{kind} {part.use!r} is for {part.modality}, the stream is {self.modality}")
        if self.enters.use == "none" and self.connector is not None:
            raise ValueError(
                "the stream enters nothing, so its connector would never run; remove it or say how it enters"
            )
        return self


class ModelConfig(Config):
    """A whole model. Widths, token counts, positions and masks follow from its parts and are never typed."""

    streams: dict[str, StreamConfig] = Field(default_factory=dict)
    backbone: BACKBONES.field()  # type: ignore[valid-type]
    heads: dict[str, HEADS.field()] = Field(default_factory=dict)  # type: ignore[valid-type]
    """What is read out; none for an encoder that is used for its features."""
    tokenizer: TokenizerConfig = TokenizerConfig()

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        if not self.heads and not isinstance(self.backbone, NoBackboneConfig):
            raise ValueError("heads: expected at least one; a backbone without a head has nothing to learn or to give")
        for name, stream in self.streams.items():
            self._check_backbone(f"streams.{name} enters by {stream.enters.use!r}, which", stream.enters.use)
        for name, head in self.heads.items():
            self._check_backbone(f"heads.{name}, a {head.use!r} head,", head.use)
        if isinstance(self.backbone, MergeConfig):
            takes = {name: self.streams[name].enters.take for name in self.merge_streams}
            if not takes:
                raise ValueError("backbone merge: no stream enters by 'merge'")
            FUSIONS.parse(self.backbone.fusion, "backbone.fusion").check(takes)
        if isinstance(self.backbone, NoBackboneConfig) and not self.streams:
            raise ValueError("streams: a model without a backbone needs at least one stream")
        kinds = [head.use for head in self.heads.values()]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"heads: found {kinds}, expected each kind once")
        return self

    def _check_backbone(self, what: str, use: str) -> None:
        needed = _BACKBONE_OF.get(use)
        if needed is not None and self.backbone.use != needed:
            raise ValueError(f"{what} needs the backbone {needed!r}; found {self.backbone.use!r}")

    @property
    def sequence_streams(self) -> list[str]:
        """Names of the streams whose tokens stand among the text's."""
        return [name for name, stream in self.streams.items() if isinstance(stream.enters, SequenceEntry)]

    @property
    def merge_streams(self) -> list[str]:
        """Names of the streams that are merged."""
        return [name for name, stream in self.streams.items() if isinstance(stream.enters, MergeEntry)]

    def count_tokens(self, stream: str, lengths: tuple[int, ...]) -> int:
        """How many tokens an item with units of these lengths will take in the sequence."""
        config = self.streams[stream]
        assert config.connector is not None
        features = [config.encoder.num_features(length) for length in lengths]
        return sum(int(config.connector.num_tokens(count)) for count in features)
