"""All objectives by name, and a recipe's weighted sum of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.config import Table
from polymodal.core.errors import ConfigError
from polymodal.core.passes import Pass
from polymodal.objectives.classify import Classify
from polymodal.objectives.consolidation import Consolidation
from polymodal.objectives.ctc import Ctc
from polymodal.objectives.distill import Distill
from polymodal.objectives.infonce import InfoNCE
from polymodal.objectives.masked import Caption, MaskedImage, MaskedText
from polymodal.objectives.masked_patches import MaskedPatches
from polymodal.objectives.matching import Matching
from polymodal.objectives.momentum_contrast import MomentumContrast
from polymodal.objectives.next_token import NextToken
from polymodal.objectives.orthogonality import Orthogonality
from polymodal.objectives.pair_contrast import PairContrast
from polymodal.objectives.report import LossReport, ObjectiveConfig
from polymodal.objectives.sigmoid_pairs import SigmoidPairs
from polymodal.objectives.triplet import Triplet

OBJECTIVES: Table[ObjectiveConfig] = Table(
    "objective",
    [
        NextToken,
        InfoNCE,
        SigmoidPairs,
        Triplet,
        Matching,
        Classify,
        Ctc,
        MaskedText,
        MaskedImage,
        MaskedPatches,
        PairContrast,
        Caption,
        MomentumContrast,
        Distill,
        Consolidation,
        Orthogonality,
    ],
)


class WeightedObjective(NamedTuple):
    """One entry of a recipe's ``objectives``."""

    name: str
    weight: float
    config: ObjectiveConfig


def parse_objectives(mapping: Mapping[str, Any], where: str = "objectives") -> list[WeightedObjective]:
    """Read a recipe's ``objectives``.

    ``{next_token: 1.0}``, ``{infonce: {weight: 0.5, pairs: [[image, text]]}}``, or, to have one kind twice,
    ``{hub: {use: infonce, pairs: ...}, spokes: {use: infonce, pairs: ...}}``. A weight that is not given is 1.

    Raises:
        ConfigError: if there is none, a kind or key is unknown, or a weight is not a positive number.
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise ConfigError(f"{where}: found {mapping!r}, expected at least one of: {', '.join(OBJECTIVES)}")
    result = []
    for name, value in mapping.items():
        place = f"{where}.{name}"
        data = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = data.pop("weight", 1.0)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"{place}: found the weight {weight!r}, expected a number above 0; "
                "leave the objective out to switch it off"
            )
        config = OBJECTIVES.parse({"use": name, **data}, place)
        result.append(WeightedObjective(name, float(weight), config))
    return result


def passes_of(objectives: Iterable[WeightedObjective]) -> frozenset[Pass]:
    """The passes that must run for some objectives; those that read weights alone need none."""
    return frozenset(entry.config.needs for entry in objectives if entry.config.needs is not None)


class Losses(NamedTuple):
    """The weighted sum of several objectives, and each one's own report (unweighted)."""

    total: Tensor
    reports: dict[str, LossReport]

    def values(self) -> dict[str, float]:
        """Numbers for the log: ``name`` and ``name/part`` of every objective that counted something."""
        numbers = {}
        for name, report in self.reports.items():
            if report.count:
                numbers[name] = float(report.total.detach())
                numbers.update({f"{name}/{part}": float(value) for part, value in report.parts.items()})
        return numbers


def weighted_losses(objectives: Iterable[WeightedObjective], outputs: Outputs, batch: Batch) -> Losses:
    """Call every objective once and add them up; ``total`` has no graph if none of them counted anything."""
    reports = {}
    total: Tensor | None = None
    for name, weight, config in objectives:
        report = config(outputs, batch)
        reports[name] = report
        if report.count:
            total = weight * report.total if total is None else total + weight * report.total
    return Losses(torch.zeros(()) if total is None else total, reports)
