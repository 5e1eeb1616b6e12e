"""Names of activations in published configs."""

from __future__ import annotations

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.layers import Activation

_OURS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def activation(hub: str) -> Activation:
    """Our name of a published activation.

    Raises:
        ConfigError: if there is none.
    """
    if hub not in _OURS:
        raise ConfigError(unknown("activation", hub, _OURS))
    return _OURS[hub]


def hub_activation(ours: str) -> str:
    """The first published name of one of our activations."""
    return next(hub for hub, mine in _OURS.items() if mine == ours)
