"""The declarative form of a model: streams, backbone, heads, tokenizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from polymodal.core.config import Config, unknown
from polymodal.core.parts import MODALITIES
from polymodal.modalities.table import READERS
from polymodal.models.backbones.decoder import Look
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.backbones.table import BACKBONES, MergeConfig, NoBackboneConfig
from polymodal.models.connectors.table import ARRANGEMENTS, CONNECTORS
from polymodal.models.encoders.table import ENCODERS
from polymodal.models.entries.fusions import FUSIONS
from polymodal.models.entries.table import ENTRIES, CrossAttentionEntry, MergeEntry, SequenceEntry
from polymodal.models.heads.table import HEADS

_BACKBONE_OF = {
    "sequence": ("decoder", "transformers", "encoder", "encoder_decoder"),
    "cross_attention": ("decoder", "encoder", "encoder_decoder"),
    "next_token": ("decoder", "transformers", "encoder_decoder"),
    "merge": ("merge",),
    "latent": ("latent",),
    "instruction": ("decoder", "encoder_decoder"),
    "beside_queries": ("decoder", "transformers", "encoder_decoder", "none"),
    "query_token": ("latent",),
    "class": ("merge", "encoder", "latent"),
    "matching": ("merge", "encoder", "latent"),
}
"""The backbones one of which an entry or a head needs; those that are not here go with any."""
_UNCONNECTED = ("none", "cross_attention", "latent", "instruction", "beside_queries")
"""Entries that need no connector."""
_READ = ("instruction", "beside_queries")
"""Entries of texts that connectors read."""


class TokenizerConfig(Config):
    """Where the tokenizer comes from: trained on the recipe's text (``bpe``), or the files of a checkpoint (``file``).

    Nothing is ever added to the tokenizer of a checkpoint but what stands in ``add``.
    """

    use: Literal["bpe", "file"] = "bpe"
    """``bpe``: trained on the recipe's text; ``file``: that of a checkpoint."""
    vocab_size: PositiveInt = 1024
    """Ids in all, for ``bpe``; the trained tokenizer may have fewer where the text has fewer merges."""
    path: str | None = None
    """For ``file``: a ``tokenizer.json``, a SentencePiece ``.model``, or a folder with tokenizer files."""
    pad: str | None = None
    """Token that fills rows, always masked; None: what the files name, or else the end token."""
    media: str | None = None
    """Placeholder of media; None: the pad token, since its embedding is written over."""
    bos: str | None = None
    """Token that begins a text; None: what the files name."""
    eos: str | None = None
    """Token that ends a text; None: what the files name."""
    add: tuple[str, ...] = ()
    """Control tokens to add behind the vocabulary."""
    rows: PositiveInt | None = None
    """Rows of the token embedding where a checkpoint has more than ids; None: one for each id."""

    @model_validator(mode="after")
    def _has_path(self) -> TokenizerConfig:
        if (self.use == "file") != (self.path is not None):
            raise ValueError("'path' belongs to use: file, and use: file needs it")
        given = [name for name in ("pad", "media", "bos", "eos", "add") if getattr(self, name)]
        if self.use == "bpe" and given:
            raise ValueError(f"{given[0]!r} belongs to use: file; a tokenizer that is trained here names its own")
        return self


class StreamConfig(Config):
    """A named path into the model: one modality, one encoder, one connector, and how it enters."""

    modality: str
    """What it reads: text, image, audio, video, points or sensor."""
    encoder: ENCODERS.field()  # type: ignore[valid-type]
    """Units of the modality become features."""
    reader: READERS.field() | None = None  # type: ignore[valid-type]
    """Preprocessing; None derives it from the encoder."""
    connector: CONNECTORS.field() | None = None  # type: ignore[valid-type]
    """None: none is needed (streams that enter nothing, features that a decoder looks at), or linear."""
    arrange: ARRANGEMENTS.field() | None = None  # type: ignore[valid-type]
    """How the tokens of an item's units become its sequence, for a stream that enters by ``sequence``; None: one unit
    after another."""
    enters: ENTRIES.field() = Field(default_factory=lambda: ENTRIES.parse("none"))  # type: ignore[valid-type]
    """How its tokens meet those of other streams."""
    view: str | None = None
    """Name of a sample's view that it reads (``depth``: a picture of depth); None: the modality's own. A stream with a
    named view reads no media of conversations."""
    tokens: PositiveInt | None = None
    """The most tokens of all its items in a sample, for a stream that enters by ``sequence``: fewer tiles or frames,
    and neighbouring tokens pooled, until they fit. None: any number."""
    shares: str | None = None
    """Another stream whose encoder's trunk this one's is: the same weights (images and frames); None: its own."""
    shares_tokens: bool = False
    """With ``shares``: whether the connector and the learned token of ``arrange`` are the other stream's, too."""

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
        if data.get("connector") is None and entry.use not in _UNCONNECTED:
            data["connector"] = CONNECTORS.parse("linear")
        return data

    @model_validator(mode="after")
    def _agree(self) -> StreamConfig:
        if self.modality not in MODALITIES:
            raise ValueError(unknown("modality", self.modality, MODALITIES))
        for kind, part in (("encoder", self.encoder), ("reader", self.reader)):
            if part is not None and part.modality != self.modality:
                raise ValueError(f"{kind} {part.use!r} is for {part.modality}, the stream is {self.modality}")
        if self.tokens is not None and self.enters.use != "sequence":
            raise ValueError("'tokens' is a budget of a sequence; found a stream that does not enter by 'sequence'")
        if self.arrange is not None and (self.enters.use != "sequence" or self.modality != self.arrange.modality):
            raise ValueError(
                f"arrange {self.arrange.use!r} lays out the tokens of {self.arrange.modality} in a sequence; found a "
                f"stream of {self.modality} that enters by {self.enters.use!r}"
            )
        if self.enters.use == "none" and self.connector is not None and not getattr(self.connector, "words", False):
            raise ValueError(
                "the stream enters nothing, so its connector would never run; remove it or say how it enters"
            )
        return self


class ModelConfig(Config):
    """A whole model. Widths, token counts, positions and masks follow from its parts and are never typed."""

    streams: dict[str, StreamConfig] = Field(default_factory=dict)
    """By name; paths in the rest of a recipe start with ``streams.NAME``."""
    backbone: BACKBONES.field()  # type: ignore[valid-type]
    """Where streams meet."""
    heads: dict[str, HEADS.field()] = Field(default_factory=dict)  # type: ignore[valid-type]
    """What is read out; none for an encoder that is used for its features."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Of the text that the backbone reads and writes."""

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        if not self.heads and not isinstance(self.backbone, NoBackboneConfig | EncoderBackboneConfig):
            raise ValueError("heads: expected at least one; a backbone without a head has nothing to learn or to give")
        for name, stream in self.streams.items():
            self._check_backbone(f"streams.{name} enters by {stream.enters.use!r}, which", stream.enters.use)
        for name, head in self.heads.items():
            if getattr(head, "at", None) == "queries":
                self._check_queries(name, head)
            elif getattr(head, "stream", None) is None:
                self._check_backbone(f"heads.{name}, a {head.use!r} head,", head.use)
        self._check_watched()
        self._check_latent()
        self._check_shares()
        if isinstance(self.backbone, MergeConfig):
            takes = {name: self.streams[name].enters.take for name in self.merge_streams}
            if not takes:
                raise ValueError("backbone merge: no stream enters by 'merge'")
            FUSIONS.parse(self.backbone.fusion, "backbone.fusion").check(takes)
        if isinstance(self.backbone, NoBackboneConfig) and not self.streams:
            raise ValueError("streams: a model without a backbone needs at least one stream")
        kinds = [head.use for head in self.heads.values() if head.use not in ("masked_token", "pooler")]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"heads: found {kinds}, expected each kind but masked_token and pooler once")
        return self

    def _check_shares(self) -> None:
        """What streams share is there; only a decoder reads arranged tokens."""
        for name, stream in self.streams.items():
            others = [other for other in self.streams if other != name and self.streams[other].shares is None]
            if stream.shares is not None and stream.shares not in others:
                raise ValueError(f"streams.{name}.shares: {unknown('stream', stream.shares, others)}")
            if stream.shares_tokens and stream.shares is None:
                raise ValueError(f"streams.{name}.shares_tokens: found no 'shares' that says whose")
            if stream.arrange is not None and isinstance(self.backbone, EncoderBackboneConfig):
                raise ValueError(f"streams.{name}.arrange: found the backbone 'encoder', expected one that decodes")
            if stream.view in MODALITIES:
                raise ValueError(f"streams.{name}.view: found {stream.view!r}, expected a name that is no modality")

    def _check_queries(self, name: str, head: Any) -> None:
        """Heads at queries read one Q-Former, and of texts the one that stands beside its queries."""
        if self.queried_pair is None:
            raise ValueError(
                f"heads.{name}: stands at 'queries', expected one stream whose connector has words: true and one text "
                "stream that enters by 'beside_queries'"
            )
        words = self.queried_pair[1]
        if head.use == "masked_token" and (head.stream, head.predicts) != (words, "tokens"):
            raise ValueError(
                f"heads.{name}: found {head.predicts} of the stream {head.stream!r}, expected at 'queries' the tokens "
                f"of {words!r}"
            )

    def _check_instruction(self) -> None:
        """Who reads words beside queries, and who gives them."""
        readers = [n for n, stream in self.streams.items() if getattr(stream.connector, "words", False)]
        givers = [n for n, stream in self.streams.items() if stream.enters.use in _READ]
        if bool(readers) != bool(givers) or len(givers) > 1:
            raise ValueError(
                f"streams: found connectors that read words in {readers} and words in {givers}, expected one text "
                "stream that enters by 'instruction' or 'beside_queries' where a connector has words: true, and none "
                "elsewhere"
            )
        for giver in givers:
            width = self.streams[giver].encoder.width
            for name in readers:
                connector: Any = self.streams[name].connector
                if connector.width != width or self.streams[giver].modality != "text":
                    raise ValueError(
                        f"streams.{giver}: found {self.streams[giver].modality} of width {width}, expected text of "
                        f"width {connector.width}, that of the connector of {name!r}"
                    )

    def _check_latent(self) -> None:
        """What latents read has one width."""
        for name in self.latent_streams:
            stream, width = self.streams[name], getattr(self.backbone, "input_width", None)
            if stream.connector is None and width is not None and stream.encoder.width != width:
                raise ValueError(
                    f"streams.{name}: its features have width {stream.encoder.width}, the latents read input_width "
                    f"{width}; give the stream a connector"
                )
        for name, head in self.heads.items():
            if head.use == "query_token" or getattr(head, "query_heads", None) is not None:
                self._check_backbone(f"heads.{name}, which asks latents,", "latent")

    def _check_watched(self) -> None:
        """One set of cross-attending blocks serves all streams that enter so; one text is the instruction."""
        self._check_instruction()
        found = {}
        for name in self.watched_streams:
            entry = self.streams[name].enters
            found[name] = (entry.every, entry.gate, entry.qk_norm, self.memory_width(name))
        if len(set(found.values())) > 1:
            raise ValueError(
                f"streams that enter by 'cross_attention' must agree in every, gate, qk_norm and width, found {found}; "
                "a connector gives the backbone's width"
            )

    def _check_backbone(self, what: str, use: str) -> None:
        needed = _BACKBONE_OF.get(use)
        if needed is not None and self.backbone.use not in needed:
            raise ValueError(f"{what} needs the backbone {needed[0]!r}; found {self.backbone.use!r}")

    @property
    def sequence_streams(self) -> list[str]:
        """Names of the streams whose tokens stand among the text's."""
        return [name for name, stream in self.streams.items() if isinstance(stream.enters, SequenceEntry)]

    @property
    def watched_streams(self) -> list[str]:
        """Names of the streams that the decoder looks at by cross-attention."""
        return [name for name, stream in self.streams.items() if isinstance(stream.enters, CrossAttentionEntry)]

    @property
    def instruction_stream(self) -> str | None:
        """Name of the text stream that reads the last user turn, for connectors."""
        return next((name for name, stream in self.streams.items() if stream.enters.use == "instruction"), None)

    @property
    def queried_pair(self) -> tuple[str, str] | None:
        """The stream whose Q-Former reads texts beside its queries, and the stream of these texts; None unless one."""
        readers = [name for name, stream in self.streams.items() if getattr(stream.connector, "words", False)]
        givers = [name for name, stream in self.streams.items() if stream.enters.use in _READ]
        return (readers[0], givers[0]) if len(readers) == len(givers) == 1 else None

    @property
    def query_width(self) -> int | None:
        """Width of the states of these queries and words."""
        return None if self.queried_pair is None else int(self.streams[self.queried_pair[1]].encoder.width)

    @property
    def latent_streams(self) -> list[str]:
        """Names of the streams that the latents read."""
        return [name for name, stream in self.streams.items() if stream.enters.use == "latent"]

    @property
    def merge_streams(self) -> list[str]:
        """Names of the streams that are merged."""
        return [name for name, stream in self.streams.items() if isinstance(stream.enters, MergeEntry)]

    @property
    def look(self) -> Look | None:
        """How the decoder's blocks look at those streams; None if there are none."""
        names = self.watched_streams
        if not names:
            return None
        entry = self.streams[names[0]].enters
        return Look(self.memory_width(names[0]), entry.every, entry.gate, entry.qk_norm)

    def memory_width(self, stream: str) -> int:
        """Width of what a decoder sees of a stream."""
        config = self.streams[stream]
        if config.connector is None:
            return int(config.encoder.width)
        return int(config.connector.width_for(self.backbone.width))

    def has_placeholders(self, stream: str) -> bool:
        """Whether tokens stand in the sequence for a stream's items."""
        entry = self.streams[stream].enters
        return isinstance(entry, SequenceEntry) or (isinstance(entry, CrossAttentionEntry) and entry.has_placeholder)

    def count_placeholders(self, stream: str, lengths: tuple[int, ...]) -> int:
        """How many tokens stand in the sequence for an item with units of these lengths."""
        if isinstance(self.streams[stream].enters, CrossAttentionEntry):
            return int(self.has_placeholders(stream))
        return self.count_tokens(stream, lengths)

    def count_tokens(self, stream: str, lengths: tuple[int, ...]) -> int:
        """How many tokens an item with units of these lengths becomes, in the sequence or in a memory."""
        config = self.streams[stream]
        features = [config.encoder.num_features(length) for length in lengths]
        if config.connector is not None:
            features = [int(config.connector.num_tokens(count)) for count in features]
        return sum(features) if config.arrange is None else int(config.arrange.num_tokens(features, lengths))
