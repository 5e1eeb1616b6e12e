"""Magnitude pruning: the smallest weights of a stage become zero, step by step, and stay zero."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from polymodal.core.config import Config
from polymodal.core.errors import CheckFailed, ConfigError
from polymodal.core.patterns import match_names
from polymodal.models.adapters import adapter_parameters


class PruneConfig(Config):
    """How many weights go, when, and from where.

    Args:
        sparsity: share of the pruned matrices that is zero in the end.
        scope: ``layer``: every matrix has that share; ``global``: all of them together, the smallest wherever they are.
        begin: share of the stage's steps after which the first go.
        end: share after which the last have gone; the rest of the stage repairs.
        every: steps between two prunings.
        match: which weights, as paths or patterns; of those that train, matrices of linear layers and convolutions.

    Source: Zhu and Gupta, arXiv 1710.01878, section 3, equation 1 (cubic schedule); global scope: Han, arXiv
    1506.02626, section 3.
    """

    sparsity: float = Field(gt=0, lt=1)
    scope: Literal["global", "layer"] = "layer"
    begin: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=0.5, gt=0, le=1)
    every: PositiveInt = 10
    match: tuple[str, ...] = Field(default=("*",), min_length=1)

    @model_validator(mode="after")
    def _agree(self) -> PruneConfig:
        if self.begin >= self.end:
            raise ValueError(f"found begin {self.begin} and end {self.end}, expected begin before end")
        return self

    def target(self, step: int, steps: int) -> float:
        """The share that is zero after ``step`` of ``steps``.

        Worked example: of 0.5 over the whole stage, 0.4375 is there half way.
        """
        first, last = self.begin * steps, self.end * steps
        progress = min(max((step - first) / (last - first), 0.0), 1.0)
        return self.sparsity * (1 - (1 - progress) ** 3)


class Pruner:
    """The masks of a stage.

    Args:
        config: how.
        model: ``requires_grad`` set.
        steps: of the stage.

    Raises:
        ConfigError: if a pattern names no weight that can be pruned.
    """

    def __init__(self, config: PruneConfig, model: nn.Module, steps: int) -> None:
        self.config, self.steps = config, steps
        self.weights = _prunable(model, config)
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}

    @torch.no_grad()
    def after(self, step: int) -> float:
        """Prune what the schedule asks for after ``step`` updates, and hold what is pruned at zero; the sparsity."""
        last = min(self.steps, int(self.config.end * self.steps + 0.999999))
        if step == last or (step < last and step % self.config.every == 0):
            self._choose(self.config.target(step, self.steps) if step < last else self.config.sparsity)
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])
        return self.sparsity

    @property
    def sparsity(self) -> float:
        """Share of the pruned matrices whose mask is closed."""
        closed = sum(int((~mask).sum()) for mask in self.masks.values())
        return closed / sum(mask.numel() for mask in self.masks.values())

    def _choose(self, share: float) -> None:
        sizes = {name: weight.abs() * self.masks[name] for name, weight in self.weights.items()}
        if self.config.scope == "global":
            flat = torch.cat([size.reshape(-1) for size in sizes.values()])
            chosen = torch.split(_largest(flat, share), [size.numel() for size in sizes.values()])
            self.masks = {name: mask.view_as(sizes[name]) for name, mask in zip(sizes, chosen, strict=True)}
            return
        self.masks = {name: _largest(size.reshape(-1), share).view_as(size) for name, size in sizes.items()}

    def state(self) -> dict[str, Tensor]:
        """The masks, for a checkpoint."""
        return {name: mask.to(torch.uint8) for name, mask in self.masks.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with the masks of a checkpoint."""
        self.masks = {name: state[name].to(self.masks[name].device).bool() for name in self.masks}

    def prove(self, stage: str) -> float:
        """The share of the weights that is zero, when the stage has ended.

        Raises:
            CheckFailed: if it is less than was asked for, or a pruned weight is not zero.
        """
        alive = [name for name, weight in self.weights.items() if bool((weight[~self.masks[name]] != 0).any())]
        zeros = sum(int((weight == 0).sum()) for weight in self.weights.values())
        total = sum(weight.numel() for weight in self.weights.values())
        # Shares are rounded to whole weights in every matrix.
        allowed = len(self.weights) / total
        if alive or zeros / total < self.config.sparsity - allowed:
            what = f"{alive[0]} has pruned weights that are not zero" if alive else f"{zeros / total:.4f} are zero"
            raise CheckFailed(f"stage {stage!r}: {what}, expected a sparsity of {self.config.sparsity}")
        return zeros / total


def _largest(size_N: Tensor, share: float) -> Tensor:
    """A mask over all but the smallest ``share`` of the numbers; equal ones go in their order."""
    count = round(share * size_N.numel())
    mask_N = torch.ones_like(size_N, dtype=torch.bool)
    mask_N[torch.sort(size_N, stable=True).indices[:count]] = False
    return mask_N


def _prunable(model: nn.Module, config: PruneConfig) -> dict[str, nn.Parameter]:
    adapters = adapter_parameters(model)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    owners = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in owners - embeddings and name not in adapters
    }
    if not found:
        raise ConfigError("prune: no weight of a linear layer or convolution trains in this stage, expected some")
    chosen: set[str] = set()
    for pattern in config.match:
        chosen.update(match_names(pattern, found, "trained matrix", "prune.match"))
    return {name: parameter for name, parameter in found.items() if name in chosen}
