"""Muon: the momentum of a matrix, orthogonalised; AdamW for everything else.

Legend: ``N`` matrices of one shape, ``R`` rows, ``C`` columns with ``R <= C``.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW

from polymodal.training.stepping import OwnOptimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS = 0.2
"""About the size of an entry of AdamW's update; an orthogonal matrix scaled to it suits AdamW's rates."""


class Muon(OwnOptimizer):
    """``m = b m + (1 - b) g``, then ``w -= lr * (s * orthogonal((1 - b) g + b m) + decay * w)``.

    ``s = 0.2 sqrt(max(rows, columns))`` gives the update the size of AdamW's; filters of convolutions are taken as
    matrices with one row per output. A gradient of a matrix is dominated by few directions; orthogonalising lets the
    rare ones count as much, and a network learns in a third to half of the updates (figures: ``docs/log.md``).

    Source: K. Jordan 2024, "Muon: an optimizer for hidden layers in neural networks"; scale and decay: arXiv
    2502.16982, section 2.2.

    Args:
        matrices: groups of parameters with two axes or more.
        others: groups for AdamW.
        momentum: ``b``.
        steps: of the Newton-Schulz iteration.
        betas: of AdamW; eps: likewise.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        momentum: float = 0.95,
        steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self._others: AdamW | None = None
        self._num_matrix_groups = len(matrices)
        if others:
            devices = {p.device.type for group in others for p in group["params"]}
            self._others = AdamW(others, betas=betas, eps=eps, fused=devices <= {"cpu", "cuda"})
        for group in matrices:
            group.update(momentum=momentum, steps=steps)
        super().__init__([*matrices, *others], {})
        self._share()

    def _share(self) -> None:
        """AdamW works on this optimizer's groups and state, so that rates and checkpoints are one."""
        if self._others is not None:
            self._others.param_groups = self.param_groups[self._num_matrix_groups :]
            self._others.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self._share()

    def update_all(self) -> None:
        """See :class:`OwnOptimizer`."""
        for group in self.param_groups[: self._num_matrix_groups]:
            self._update(group)
        if self._others is not None:
            self._others.step()

    def _update(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[torch.device, int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            direction_RC = torch.lerp(weight.grad, momentum, group["momentum"]).flatten(1)
            by_shape[(weight.device, *direction_RC.shape)].append((weight, direction_RC))
        for (device, rows, columns), entries in by_shape.items():
            directions_NRC = torch.stack([direction for _, direction in entries]).to(_product_dtype(device))
            if rows > columns:
                directions_NRC = directions_NRC.mT
            updates_NRC = orthogonal(directions_NRC, group["steps"])
            rate = group["lr"] * _RMS * max(rows, columns) ** 0.5
            for (weight, _), update_RC in zip(entries, updates_NRC, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                update_RC = update_RC.mT if rows > columns else update_RC
                weight.add_(update_RC.reshape(weight.shape).to(weight.dtype), alpha=-rate)


def orthogonal(x_NRC: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest matrices with orthonormal rows: singular values near 1 (0.7 to 1.2) in place of their own.

    Source: Jordan 2024 (see :class:`Muon`), "Newton-Schulz": ``x = a x + (b A + c A A) x`` with ``A = x x^T``.

    Args:
        x_NRC: matrices with no more rows than columns.
        steps: iterations.
    """
    a, b, c = _QUINTIC
    x_NRC = x_NRC / (x_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def matrices_of(model: nn.Module) -> set[int]:
    """Identities of the weights of linear layers and convolutions, those shared with an embedding apart."""
    layers = (m.weight for m in model.modules() if isinstance(m, nn.Linear | _ConvNd))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return {id(weight) for weight in layers} - tables


def _product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which the iteration bears (Jordan 2024), where the device multiplies in it; a CPU may not."""
    if device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.float32
    return torch.bfloat16
