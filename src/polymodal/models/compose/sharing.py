"""Modules that several streams have in common."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.models.connectors.arrangements import Arrangement


class Modules(Protocol):
    """The modules of a stream."""

    encoder: nn.Module
    connector: nn.Module | None
    arrangement: nn.Module | None


def share_trunk(name: str, stream: Modules, shared: str, other: Modules) -> None:
    """Make the trunk of one stream's encoder that of another's.

    Raises:
        ConfigError: if one of them has no trunk, or they differ.
    """
    mine, theirs = getattr(stream.encoder, "trunk", None), getattr(other.encoder, "trunk", None)
    for owner, trunk in ((name, mine), (shared, theirs)):
        if not isinstance(trunk, nn.Module):
            raise ConfigError(f"streams.{name}.shares: the encoder of the stream {owner!r} has no trunk to share")
    assert isinstance(mine, nn.Module) and isinstance(theirs, nn.Module)
    own, shared_shapes = ({key: x.shape for key, x in trunk.state_dict().items()} for trunk in (mine, theirs))
    if own != shared_shapes:
        wrong = sorted(key for key in own.keys() | shared_shapes.keys() if own.get(key) != shared_shapes.get(key))
        raise ConfigError(
            f"streams.{name}.shares: the trunks of {name!r} and {shared!r} differ in {wrong[0]}; give both encoders "
            "the same sizes"
        )
    stream.encoder.trunk = theirs


def share_tokens(name: str, stream: Modules, shared: str, other: Modules) -> None:
    """Make the connector of one stream, and what its arrangement has learned, those of another.

    Raises:
        ConfigError: if one of them has no connector, or they differ.
    """
    shapes = [
        None if part is None else {key: x.shape for key, x in part.state_dict().items()}
        for part in (stream.connector, other.connector)
    ]
    if shapes[0] is None or shapes[0] != shapes[1]:
        raise ConfigError(
            f"streams.{name}.shares_tokens: the connectors of {name!r} and {shared!r} differ, or one has none; give "
            "both the same"
        )
    stream.connector = other.connector
    if isinstance(stream.arrangement, Arrangement) and isinstance(other.arrangement, Arrangement):
        stream.arrangement.newline = other.arrangement.newline
