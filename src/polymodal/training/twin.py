"""The momentum twin: a second model that follows the trained one slowly, and queues of what it said.

Legend: ``I`` items, ``Q`` vectors of a queue, ``E`` width of the shared space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from polymodal.core.batch import Batch, Outputs, Teacher
from polymodal.core.errors import ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.objectives.momentum_contrast import sample_groups
from polymodal.objectives.report import TwinNeed
from polymodal.objectives.table import WeightedObjective


class Twin:
    """The twin's weights and queues: part of a run's state, saved and restored with it.

    Weights that do not train are shared with the model, so that they take no memory. In one step the twin speaks, the
    model learns, the twin follows, and what it said joins the queues.

    Source: MoCo, arXiv 1911.05722, section 3.2, equation 2.

    Args:
        model: the trained model, ``requires_grad`` set.
        need: decay and length of the queues.
    """

    def __init__(self, model: MultimodalModel, need: TwinNeed) -> None:
        self.model, self.need = model, need
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.network: MultimodalModel = copy.deepcopy(model, shared)
        self.network.requires_grad_(False).eval()
        own = dict(self.network.named_parameters())
        self._followed = [(own[name], p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.queues: dict[str, Tensor] = {}
        self.groups: dict[str, Tensor] = {}
        self._said: list[dict[str, tuple[Tensor, Tensor]]] = []

    @classmethod
    def of(cls, model: MultimodalModel, objectives: Sequence[WeightedObjective]) -> Twin | None:
        """The twin that a stage's objectives need; None if none does.

        Raises:
            ConfigError: if they need twins of different decay.
        """
        needs = {entry.name: entry.config.twin for entry in objectives if entry.config.twin is not None}
        if not needs:
            return None
        decays = {need.decay for need in needs.values()}
        if len(decays) > 1:
            raise ConfigError(f"objectives {sorted(needs)}: found decays {sorted(decays)}, expected one twin for all")
        passes = dict.fromkeys(needed for need in needs.values() for needed in need.passes)
        return cls(model, TwinNeed(decays.pop(), max(need.queue for need in needs.values()), tuple(passes)))

    @torch.no_grad()
    def teach(self, batch: Batch, outputs: Outputs, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Put what the twin says of a batch into ``outputs.teacher``; the same places are hidden from it."""
        shown = {needed.run: found.shown for needed, found in outputs.tokens.items()}
        with autocast():
            told = self.network(batch, self.need.passes, shown)
        said = told.embeddings
        width = next(iter(said.values()))[0].shape[1] if said else 0
        device = batch.ids.device
        queues = {name: self.queues.get(name, torch.zeros(0, width, device=device)) for name in said}
        groups = {name: self.groups.get(name, torch.zeros(0, dtype=torch.int64, device=device)) for name in said}
        outputs.teacher = Teacher(said, queues, groups, told.tokens)
        self._said.append({name: (x_IE, sample_groups(batch, owners)) for name, (x_IE, owners) in said.items()})

    def forget(self) -> None:
        """Drop what was said since the last step, which was no step."""
        self._said.clear()

    @torch.no_grad()
    def follow(self) -> None:
        """After a step: move towards the model, and queue what was said; the newest vectors stand first."""
        for ours, theirs in self._followed:
            ours.lerp_(theirs, 1 - self.need.decay)
        for mine, other in zip(self.network.buffers(), self.model.buffers(), strict=True):
            mine.copy_(other)
        for said in self._said:
            for name, (x_IE, groups_I) in said.items():
                older = self.queues.get(name, x_IE[:0]), self.groups.get(name, groups_I[:0])
                self.queues[name] = torch.cat([x_IE, older[0]])[: self.need.queue]
                self.groups[name] = torch.cat([groups_I, older[1]])[: self.need.queue]
        self._said.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the twin's own weights and the queues."""
        weights = {name: ours for name, (ours, _) in zip(self._names, self._followed, strict=True)}
        return {"weights": weights, "queues": dict(self.queues), "groups": dict(self.groups)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        for name, (ours, _) in zip(self._names, self._followed, strict=True):
            ours.copy_(state["weights"][name])
        device = self._followed[0][0].device
        self.queues = {name: queue.to(device) for name, queue in state["queues"].items()}
        self.groups = {name: groups.to(device) for name, groups in state["groups"].items()}
