"""Optimizers by name, and how parameters are put into groups."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from polymodal.core.config import Config, Table
from polymodal.core.errors import ConfigError
from polymodal.core.patterns import match_names, matches
from polymodal.training.muon import Muon, matrices_of
from polymodal.training.stepping import OwnOptimizer

_UNDECAYED = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class OptimizerConfig(Config):
    """Base of the optimizers.

    Args:
        lr: the peak learning rate; the schedule scales it.
        weight_decay: decoupled decay of weights with two or more axes; embeddings, norms, biases and other vectors
            are not decayed.
        lr_scale: factor of the learning rate for the parameters that a path or pattern names; the last match counts.
    """

    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scale: dict[str, float] = Field(default_factory=dict)

    @field_validator("lr_scale")
    @classmethod
    def _positive(cls, lr_scale: dict[str, float]) -> dict[str, float]:
        for pattern, factor in lr_scale.items():
            if factor <= 0:
                raise ValueError(f"the factor of {pattern!r} is {factor}, expected above 0; freeze a part with 'train'")
        return lr_scale

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer of the model's trainable parameters.

        Raises:
            ConfigError: if nothing is trainable or a pattern of ``lr_scale`` matches nothing.
        """
        raise NotImplementedError


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay; one fused kernel per step on CPU and CUDA.

    Source: arXiv 1711.05101, algorithm 2.
    """

    use: Literal["adamw"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared gradient's mean."""

    _betas = field_validator("betas")(lambda betas: _checked_betas(betas))

    def build(self, model: nn.Module) -> Optimizer:
        """See :meth:`OptimizerConfig.build`."""
        groups = parameter_groups(model, self)
        devices = {p.device.type for group in groups for p in group["params"]}
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=devices <= {"cpu", "cuda"})


class LionConfig(OptimizerConfig):
    """Sign of an interpolated momentum; wants about a third of AdamW's rate and three times its decay."""

    use: Literal["lion"] = "lion"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.03, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)

    _betas = field_validator("betas")(lambda betas: _checked_betas(betas))

    def build(self, model: nn.Module) -> Optimizer:
        """See :meth:`OptimizerConfig.build`."""
        return Lion(parameter_groups(model, self), lr=self.lr, betas=self.betas)


class MuonConfig(OptimizerConfig):
    """Orthogonalised momentum for the weights of linear layers and convolutions, AdamW for everything else.

    Costs two more matrix products of a weight's size per step and saves half of the steps or more of small networks.
    """

    use: Literal["muon"] = "muon"
    lr: float = Field(default=3e-3, gt=0)
    """Of the matrices; their updates have the size of AdamW's."""
    adamw_lr: float | None = Field(default=None, gt=0)
    """Of everything else: embeddings, norms, biases; None: a third of ``lr``."""
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's squared gradient's mean."""

    _betas = field_validator("betas")(lambda betas: _checked_betas(betas))

    def build(self, model: nn.Module) -> Optimizer:
        """See :meth:`OptimizerConfig.build`."""
        chosen = matrices_of(model)
        adamw_scale = 1 / 3 if self.adamw_lr is None else self.adamw_lr / self.lr
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in parameter_groups(model, self):
            for is_matrix, into in ((True, matrices), (False, others)):
                part = [i for i, p in enumerate(group["params"]) if (id(p) in chosen) is is_matrix]
                if part:
                    lr = group["lr"] * (1.0 if is_matrix else adamw_scale)
                    taken = {key: [group[key][i] for i in part] for key in ("params", "names")}
                    into.append({**group, **taken, "lr": lr, "base_lr": lr})
        return Muon(matrices, others, momentum=self.momentum, betas=self.betas, eps=self.eps)


def _checked_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"found betas {list(betas)}, expected two numbers in [0, 1)")
    return betas


OPTIMIZERS: Table[OptimizerConfig] = Table("optimizer", [AdamW, LionConfig, MuonConfig])


class Lion(OwnOptimizer):
    """``w -= lr * (sign(b1 * m + (1 - b1) * g) + decay * w)``, then ``m = b2 * m + (1 - b2) * g``.

    Source: arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update_all(self) -> None:
        """See :class:`OwnOptimizer`."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        direction = torch.lerp(grad, momentum, beta1).sign_()
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        momentum.lerp_(grad, 1 - beta2)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters by decay and rate; each group has ``params``, ``names``, ``lr``, ``base_lr``.

    Raises:
        ConfigError: if nothing is trainable or a pattern of ``lr_scale`` matches no trainable parameter.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError("optimizer: found no trainable parameter, expected at least one; see the stage's 'train'")
    names = [name for name, _ in named]
    for pattern in config.lr_scale:
        match_names(pattern, names, "trainable parameter", "optimizer.lr_scale")
    spared = {id(p) for m in model.modules() if isinstance(m, _UNDECAYED) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        factor = next((f for pattern, f in reversed(config.lr_scale.items()) if matches(pattern, name)), 1.0)
        decay = config.weight_decay if parameter.ndim >= 2 and id(parameter) not in spared else 0.0
        lr = config.lr * factor
        new = {"params": [], "names": [], "lr": lr, "base_lr": lr, "weight_decay": decay}
        group = groups.setdefault((lr, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_gradients(optimizer: Optimizer, max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm``.

    Returns:
        The norm before. Where it is not finite the gradients are of no use, and the update must be skipped.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(nn.utils.clip_grad_norm_(parameters, max_norm))
