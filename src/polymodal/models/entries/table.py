"""How a stream enters: among the text's tokens, merged with other streams, or not at all."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from polymodal.core.config import Config, Table


class EntryConfig(Config):
    """Base of the entries."""

    use: str


class SequenceEntry(EntryConfig):
    """The stream's tokens stand among the text's, at its placeholders (LLaVA, BLIP-2, Emu)."""

    use: Literal["sequence"] = "sequence"


class MergeEntry(EntryConfig):
    """The stream is merged with others by a merge backbone (late and intermediate fusion)."""

    use: Literal["merge"] = "merge"
    take: Literal["pooled", "tokens"] = "pooled"
    """What is merged: the encoder's pooled vector as one token, or all of its tokens."""
    missing: Literal["absent", "learned"] = "absent"
    """A sample without this modality: its tokens are ``absent`` (masked), or one ``learned`` token stands for them."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """In training, the chance that a sample loses this modality; at least one modality always stays."""


class CrossAttentionEntry(EntryConfig):
    """Chosen blocks of the decoder look at the stream's tokens (Flamingo, BLIP, Whisper).

    Without a connector they look at the encoder's features themselves, in the encoder's width. All streams that enter
    like this stand in one memory, one after another, and agree in everything but ``mask`` and ``placeholder``.

    Source: Vaswani 1706.03762 sec. 3.2.3; with a gate, Flamingo 2204.14198 sec. 3.2.
    """

    use: Literal["cross_attention"] = "cross_attention"
    every: PositiveInt = 1
    """Blocks 0, n, 2n, ... look."""
    gate: Literal["none", "tanh", "tanh_channel"] = "none"
    """``none``: within the block, after its self-attention. ``tanh``: in a block of its own before it, behind a gate
    that starts closed, so that a finished decoder learns to see without losing what it can. ``tanh_channel``: with a
    gate per channel."""
    mask: Literal["all", "latest_media"] = "all"
    """What a token sees: ``all`` of its sample's items, or the latest at or before its place (Flamingo, sec. 3.1.3;
    of each stream). Needs placeholders, which say where the items stand."""
    placeholder: bool | None = None
    """Whether one placeholder token stands in the text for each item; None: where the mask needs it."""
    around: str | None = None
    """Control token that stands before and behind each placeholder, once between neighbours (Idefics)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""

    @model_validator(mode="after")
    def _has_places(self) -> Self:
        if self.mask == "latest_media" and self.placeholder is False:
            raise ValueError("mask: latest_media needs to know where items stand; leave placeholder out or set it")
        if self.around is not None and not self.has_placeholder:
            raise ValueError("'around' belongs to a placeholder; set placeholder")
        return self

    @property
    def has_placeholder(self) -> bool:
        """``placeholder`` with its default filled in."""
        return self.mask == "latest_media" if self.placeholder is None else self.placeholder


class LatentEntry(EntryConfig):
    """The latents of a latent backbone read the stream's tokens (Perceiver IO).

    Without a connector they read the encoder's features themselves, which then have the backbone's ``input_width``.
    """

    use: Literal["latent"] = "latent"
    code: bool = True
    """Whether a learned vector that says which stream a token is of is added to it; one stream alone needs none."""


class InstructionEntry(EntryConfig):
    """The words of the last user turn, which connectors of other streams read (InstructBLIP).

    For text streams with the encoder ``embedding`` and connectors with ``words: true``.
    """

    use: Literal["instruction"] = "instruction"


class BesideQueriesEntry(EntryConfig):
    """The texts of pairs, which the Q-Former of another stream reads beside its queries (BLIP-2's first stage).

    Heads that stand ``at: queries``, and projections ``through`` it, read its states; where its queries stand in a
    sequence they stand alone. For text streams with the encoder ``embedding`` and connectors with ``words: true``.

    Source: BLIP-2, arXiv 2301.12597, section 3.2.
    """

    use: Literal["beside_queries"] = "beside_queries"


class NoEntry(EntryConfig):
    """The stream meets others only in an objective (CLIP, ImageBind)."""

    use: Literal["none"] = "none"


ENTRIES: Table[EntryConfig] = Table(
    "entry",
    [SequenceEntry, CrossAttentionEntry, MergeEntry, LatentEntry, InstructionEntry, BesideQueriesEntry, NoEntry],
)
"""Every way to enter, by name."""
