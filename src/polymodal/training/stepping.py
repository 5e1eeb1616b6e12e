"""What optimizers of our own have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import overload

import torch
from torch.optim import Optimizer


class OwnOptimizer(Optimizer):
    """An optimizer that says in :meth:`update_all` what one step does."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all()
        return loss

    @abstractmethod
    def update_all(self) -> None:
        """Change every parameter that has a gradient."""
