"""The proofs that concern a stage's training: what gets a gradient, what stays as it is, and what it will cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from polymodal.core.batch import Batch
from polymodal.core.errors import CheckFailed
from polymodal.data.loader import Loader
from polymodal.data.protocols import Source
from polymodal.data.quarantine import Quarantine
from polymodal.models.adapters import asleep_parameters
from polymodal.models.compose import MultimodalModel
from polymodal.models.layers.transformer import GatedCross
from polymodal.objectives.table import passes_of, weighted_losses
from polymodal.recipes.proofs_of_data import Probe, join
from polymodal.training.checkpoints import Keep
from polymodal.training.freezing import fingerprint, frozen_names, set_modes, train_report
from polymodal.training.lessons import Lessons
from polymodal.training.loop import StageContext, StageRun
from polymodal.training.progress import Progress

_BATCH = 16


@dataclass(slots=True)
class Attempt:
    """A stage's beginning on a copy of the model.

    Args:
        probe: samples of its data.
        network: the copy, with the stage's adapters and ``requires_grad`` set.
        trained: the parameters that the stage names.
        lessons: the teachers of its objectives.
    """

    probe: Probe
    network: MultimodalModel
    trained: set[str]
    lessons: Lessons = field(default_factory=Lessons)


def frozen(attempt: Attempt) -> str:
    """One optimizer step: only what the stage names trains, and everything else is the same to the bit afterwards."""
    network, stage = attempt.network, attempt.probe.stage
    moving = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    strayed = sorted(moving - attempt.trained)
    if strayed:
        raise CheckFailed(f"{len(strayed)} parameters train that the stage does not name, the first is {strayed[0]!r}")
    names = frozen_names(network)
    before, weights = fingerprint(network, names), _copy(network)
    optimizer = stage.optimizer.build(network)
    _backward(attempt)
    touched = [name for name, p in network.named_parameters() if name not in attempt.trained and p.grad is not None]
    if touched:
        raise CheckFailed(f"{len(touched)} frozen parameters got a gradient, the first is {touched[0]!r}")
    optimizer.step()
    after = fingerprint(network, names)
    network.load_state_dict(weights)
    network.zero_grad(set_to_none=True)
    if after != before:
        raise CheckFailed("a frozen tensor changed in an optimizer step")
    rows = train_report(network)
    return f"{sum(row.trained for row in rows):,} trained, {sum(row.frozen for row in rows):,} frozen, hashes equal"


def _copy(network: MultimodalModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def reached(attempt: Attempt) -> str:
    """Every part that the stage trains gets a gradient that is not zero from the stage's own data and objectives."""
    with open_gates(attempt.network):
        _backward(attempt)
    gradients = {name: p.grad for name, p in attempt.network.named_parameters() if name in attempt.trained}
    # The update of an adapter starts at zero, and so does the first gradient of its inner half.
    asleep = asleep_parameters(attempt.network)
    gradients = {name: gradient for name, gradient in gradients.items() if name not in asleep}
    zero = {name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())}
    attempt.network.zero_grad(set_to_none=True)
    groups = trained_parts(gradients)
    dead = sorted(part for part, names in groups.items() if all(name in zero for name in names))
    if dead:
        raise CheckFailed(
            f"stage {attempt.probe.stage.name!r}: no gradient reaches {', '.join(dead)}; its data or objectives never "
            "use it; take it out of 'train', or add data that needs it"
        )
    rest = f"; {len(zero)} tensors without, such as {min(zero)}" if zero else ""
    return f"{len(groups)} parts, {len(gradients) - len(zero)} of {len(gradients)} tensors{rest}"


@contextmanager
def open_gates(network: nn.Module) -> Iterator[None]:
    """Within it, closed gates stand open: they start at zero, let no gradient through, and open with the first step."""
    gates = [gate for module in network.modules() if isinstance(module, GatedCross) for gate in module.gates]
    closed = [gate for gate in gates if not bool(gate.detach().any())]
    with torch.no_grad():
        for gate in closed:
            gate.fill_(1.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for gate in closed:
                gate.zero_()


def trained_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Trained parameters by part: ``streams.image.encoder``, ``backbone``, ``heads.space.projs.image``."""
    parts: dict[str, list[str]] = {}
    for name in names:
        steps = name.split(".")
        depth = {"streams": 3, "heads": 4 if "projs" in steps else 2}.get(steps[0], 1)
        parts.setdefault(".".join(steps[:depth]), []).append(name)
    return parts


def _backward(attempt: Attempt) -> None:
    """Gradients of the stage's objectives over the probed samples."""
    network, objectives = attempt.network, attempt.probe.stage.parsed_objectives()
    set_modes(network)
    passes = passes_of(objectives)
    for batch in _batches(attempt.probe):
        outputs = network(batch, passes)
        attempt.lessons.add(network, objectives, batch, outputs, contextlib.nullcontext)
        losses = weighted_losses(objectives, outputs, batch)
        if losses.total.requires_grad:
            losses.total.backward()  # type: ignore[no-untyped-call]


def _batches(probe: Probe) -> Iterator[Batch]:
    """The probed samples in batches of the stage's kind, small enough for a quick backward pass."""
    examples = probe.examples
    if not probe.stage.batch.packed:
        size = max(_BATCH, min(probe.stage.batch.samples or _BATCH, 2 * _BATCH))
        yield from (join(probe.parts, examples[i : i + size], packed=False) for i in range(0, len(examples), size))
        return
    examples = probe.conversations
    yield from (join(probe.parts, examples[i : i + _BATCH], packed=True) for i in range(0, len(examples), _BATCH))


def cost(attempt: Attempt, sources: Sequence[Source]) -> str:
    """Time and memory of the stage, from the batch that training would draw first; without the feature cache."""
    stage, parts = attempt.probe.stage, attempt.probe.parts
    weights = [entry.weight for entry in stage.data]
    compute = parts.recipe.precision.resolve()
    set_modes(attempt.network.to(compute.device))
    for teacher in attempt.lessons.teachers.values():
        teacher.to(compute.device)
    quarantine = Quarantine(max_rate=parts.recipe.max_bad_rate)
    with Loader(
        sources, weights, parts.processor, stage.batch, seed=parts.recipe.seed, quarantine=quarantine
    ) as loader:
        context = StageContext(
            stage=stage,
            model=attempt.network,
            loader=loader,
            compute=compute,
            folder=Path(),
            keep=Keep(),
            progress=Progress(),
            lessons=attempt.lessons,
        )
        return str(StageRun(context).predict(next(iter(loader))))
