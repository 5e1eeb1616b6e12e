"""How a stream enters: among the text's tokens, merged with other streams, or not at all."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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


class NoEntry(EntryConfig):
    """The stream meets others only in an objective (CLIP, ImageBind)."""

    use: Literal["none"] = "none"


ENTRIES: Table[EntryConfig] = Table("entry", [SequenceEntry, MergeEntry, NoEntry])
"""Every way to enter, by name."""
