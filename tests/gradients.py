"""What backward passes must do with any part."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def assert_reach_all_but_frozen(part: nn.Module, backward: Callable[[], None]) -> None:
    """A gradient reaches every parameter of a part, and after freezing every other one, only those that train."""
    backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key's bias shifts all scores of a query alike: its true gradient is zero.
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name
    part.zero_grad(set_to_none=True)
    for index, parameter in enumerate(part.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    backward()
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in part.parameters())
