"""The Fisher information of an old task, and the pull back to the weights that it knew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.objectives.table import WeightedObjective, weighted_losses
from polymodal.training.state_files import read_tensors
from polymodal.training.weights import write_whole


@dataclass(slots=True)
class Anchor:
    """What is pulled back, where to, and how strongly.

    Args:
        fisher: of each trained parameter, by name.
        values: the parameter where the old task was done.
    """

    fisher: dict[str, Tensor]
    values: dict[str, Tensor]

    def penalty(self, model: MultimodalModel) -> Tensor:
        """Half the sum of ``fisher * (weight - value) ** 2``, a scalar with a graph."""
        own = dict(model.named_parameters())
        terms = [(fisher * (own[name] - self.values[name]).square()).sum() for name, fisher in self.fisher.items()]
        return 0.5 * torch.stack(terms).sum()

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        parts = {"fisher": self.fisher, "value": self.values}
        write_whole({f"{kind}/{name}": x for kind, part in parts.items() for name, x in part.items()}, path)

    @classmethod
    def load(cls, path: Path, model: MultimodalModel) -> Anchor:
        """Read what :meth:`save` wrote for the same stage.

        Raises:
            CheckpointError: if it is of other parameters.
        """
        tensors, device = read_tensors(path), next(model.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {"fisher": {}, "value": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor.to(device)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if parts["fisher"].keys() != trained or parts["value"].keys() != trained:
            raise CheckpointError(f"{path}: holds other weights than this stage trains; remove it, it is made anew")
        return cls(parts["fisher"], parts["value"])


def estimate_fisher(
    model: MultimodalModel,
    objectives: Sequence[WeightedObjective],
    samples: Iterable[Batch],
    forward: Callable[[Batch], Outputs],
) -> Anchor:
    """The mean over samples of the squared gradient of each sample's log-likelihood.

    Args:
        model: ``requires_grad`` set; its gradients are cleared.
        objectives: of the old task; each is a mean, which is taken times its count.
        samples: batches of one sample.
        forward: runs the model.

    Raises:
        ConfigError: if no sample has anything to learn from, or an objective compares samples with each other.
    """
    if any(entry.config.needs == "embed" or str(entry.config.needs).startswith("match") for entry in objectives):
        raise ConfigError(
            "objective ewc: the old stage compares samples with each other, which gives no likelihood of one sample; "
            "expected a stage of next_token, classify or another objective of single samples"
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    count = 0
    for batch in samples:
        model.zero_grad(set_to_none=True)
        losses = weighted_losses(objectives, forward(batch), batch)
        if not losses.total.requires_grad:
            continue
        size = max(report.count for report in losses.reports.values())
        (size * losses.total).backward()  # type: ignore[no-untyped-call]
        count += 1
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                fisher[name] += parameter.grad.square()
    model.zero_grad(set_to_none=True)
    for module, mode in modes.items():
        module.training = mode
    if not count:
        raise ConfigError("objective ewc: no sample of the old stage has anything to learn from, expected some")
    values = {name: p.detach().clone() for name, p in parameters.items()}
    return Anchor({name: total / count for name, total in fisher.items()}, values)


Anchors = Mapping[str, Anchor]
"""Per consolidation objective (its ``key``), the anchor."""
