"""``polymodal check``: the proofs of a recipe, each with its figure, before a training step is spent.

Every proof runs the recipe's own modules on the first samples of its own data, in float32, on random weights.
"""

from __future__ import annotations

import copy
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polymodal.core.batch import Batch, Example, Plan
from polymodal.core.errors import CheckFailed, PolymodalError
from polymodal.core.samples import Sample
from polymodal.data.sources import open_source
from polymodal.models.adapters import merge_lora
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.objectives.table import Losses, weighted_losses
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.schema import Recipe
from polymodal.training.freezing import apply_train, fingerprint, frozen_names, set_modes, train_report
from polymodal.training.stage import StageConfig
from polymodal.training.weights import read_weights, save_weights

NUM_PROBED = 64
"""Samples of each source that the proofs read."""
TOLERANCE = 1e-5
"""Largest relative difference between what must be equal up to the order of float32 sums."""

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Proof:
    """One line of the table: what was proved, where, whether it holds, and the figure."""

    name: str
    where: str
    status: Status
    figure: str


@dataclass(slots=True)
class CheckReport:
    """All proofs of a recipe."""

    recipe: str
    proofs: list[Proof] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether no proof failed."""
        return all(proof.status != "failed" for proof in self.proofs)

    def raise_failed(self) -> None:
        """Raise if a proof failed.

        Raises:
            CheckFailed: naming every failed proof.
        """
        failed = [f"{proof.name} ({proof.where}): {proof.figure}" for proof in self.proofs if proof.status == "failed"]
        if failed:
            raise CheckFailed("\n".join(failed))

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        rows = [
            {"proof": p.name, "where": p.where, "status": p.status, "figure": p.figure} for p in self.proofs
        ]
        return {"recipe": self.recipe, "ok": self.is_ok, "proofs": rows}


def check_recipe(recipe: Recipe) -> CheckReport:
    """Run every proof that concerns a recipe.

    A proof that raises is reported as failed with its message, and the others still run.
    """
    report = CheckReport(recipe.name)
    prove = _Prover(report)
    prove("recipe reloads equal", "recipe", lambda: _reloads(recipe))
    parts: Assembly | None = prove.get("parts build", "model", lambda: assemble(recipe))
    if parts is None:
        return report
    for stage in recipe.stages:
        _check_stage(prove, parts, stage)
    if recipe.stages:
        prove("save and load give the same weights", "model", lambda: _saves(parts))
    return report


class _Prover:
    """Runs proofs and writes their lines."""

    def __init__(self, report: CheckReport) -> None:
        self.report = report

    def __call__(self, name: str, where: str, proof: Callable[[], str | None]) -> None:
        """Run one proof: its return value is the figure; None means that it does not apply; an error that it failed."""
        try:
            figure = proof()
        except PolymodalError as error:
            self.report.proofs.append(Proof(name, where, "failed", str(error)))
            return
        status: Status = "skipped" if figure is None else "ok"
        self.report.proofs.append(Proof(name, where, status, figure or "does not apply"))

    def get(self, name: str, where: str, make: Callable[[], Any]) -> Any:
        """Like calling, for a step whose result the next proofs need; None if it failed."""
        made: list[Any] = []

        def proof() -> str:
            made.append(make())
            return _figure_of(made[0])

        self(name, where, proof)
        return made[0] if made else None


def _figure_of(made: Any) -> str:
    if isinstance(made, _Names):
        return f"{len(made)} tensors"
    if isinstance(made, Assembly):
        count = sum(p.numel() for p in made.network.parameters())
        return f"{count:,} parameters, {made.tokenizer.size:,} token ids"
    return f"{len(made)} samples"


def _reloads(recipe: Recipe) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        if load_recipe(path) != recipe:
            raise CheckFailed("the resolved recipe does not read back as an equal value")
    return f"{len(recipe.stages)} stages"


def _check_stage(prove: _Prover, parts: Assembly, stage: StageConfig) -> None:
    where = f"stage {stage.name}"
    samples: list[Sample] | None = prove.get("data is there", where, lambda: _probe(parts.recipe, stage))
    if not samples:
        return
    plans: list[Plan] | None = prove.get(
        "samples fit, no media span is cut", where, lambda: [parts.processor.plan(sample) for sample in samples]
    )
    if plans is None:
        return
    is_text = [bool(plan.ids) for plan in plans]
    if any(is_text):
        prove("every sample has supervised tokens", where, lambda: _supervised(plans))
        prove("targets are the assistant's own words", where, lambda: _targets(parts, samples, plans))
    examples: list[Example] | None = prove.get(
        "media decode", where, lambda: [parts.processor.load(plan) for plan in plans]
    )
    if examples is None:
        return
    prove("placeholders = features", where, lambda: _placeholders(parts, [e for e in examples if e.plan.ids]))
    if all(is_text):
        prove("packing leaks nothing", where, lambda: _packing(parts, examples[:8]))
        prove("padding and order change nothing", where, lambda: _padding(parts, examples[:8]))
    # Adapters and gradients are tried on a copy: the next stage starts from the model without them.
    trial = copy.deepcopy(parts.network)
    trained: set[str] | None = prove.get(
        "what trains is found", where, lambda: _Names(apply_train(trial, stage.train, f"stages.{stage.name}.train"))
    )
    if trained is None:
        return
    prove("only what trains gets a gradient, and all of it", where, lambda: _gradients(parts, trial, stage, trained, examples))
    prove("predicted cost", where, lambda: _cost(parts, trial, stage, examples))


class _Names(set[str]):
    """Names of trained parameters; counted in the figure."""


def _probe(recipe: Recipe, stage: StageConfig) -> list[Sample]:
    samples: list[Sample] = []
    for entry in stage.data:
        source = open_source(Path(recipe.data_root) / entry.path)
        if not len(source):
            raise CheckFailed(f"{entry.path}: holds no samples")
        step = max(1, len(source) // NUM_PROBED)
        samples += [source[index] for index in range(0, len(source), step)][:NUM_PROBED]
    return samples


def _supervised(plans: Sequence[Plan]) -> str:
    empty = [plan.id for plan in plans if plan.ids and not any(plan.is_supervised)]
    if empty:
        raise CheckFailed(f"{len(empty)} of {len(plans)} samples have no supervised token, the first is {empty[0]!r}")
    supervised = sum(sum(plan.is_supervised) for plan in plans)
    total = sum(plan.num_tokens for plan in plans)
    return f"{supervised:,} of {total:,} tokens ({supervised / total:.1%})"


def _targets(parts: Assembly, samples: Sequence[Sample], plans: Sequence[Plan]) -> str:
    """What is supervised must decode to what the assistant said: nothing hidden, nothing of the user's."""
    for sample, plan in zip(samples, plans, strict=True):
        if not plan.ids:
            continue
        said = "".join(m.text for m in sample.messages if m.role == "assistant")
        ids = [id for id, is_target in zip(plan.ids, plan.is_supervised, strict=True) if is_target]
        found = parts.tokenizer.decode(ids)
        whole = plan.num_tokens < parts.processor.max_tokens
        if (whole and found != said) or not said.startswith(found[: len(said)]):
            raise CheckFailed(f"sample {plan.id}: the targets read {found[:60]!r}, the assistant said {said[:60]!r}")
    return f"{len(plans)} samples, word for word"


def _placeholders(parts: Assembly, examples: Sequence[Example]) -> str | None:
    """Count what the modules really give for every item, against the places laid out for it."""
    counted = 0
    for start in range(0, len(examples), 16):
        batch = _batch(parts, examples[start : start + 16], packed=False)
        for name in parts.recipe.model.sequence_streams:
            stream = batch.streams.get(name)
            if stream is None:
                continue
            with torch.no_grad():
                found = len(parts.network.connect(name, parts.network.encode(name, stream)))
            if found != len(stream.token_index):
                raise CheckFailed(
                    f"stream {name!r}: {len(stream.token_index)} placeholders for {found} features "
                    f"of {len(stream.unit_counts)} items"
                )
            counted += found
    return f"{counted:,} = {counted:,}" if counted else None


def _batch(parts: Assembly, examples: Sequence[Example], *, packed: bool) -> Batch:
    device = next(parts.network.parameters()).device
    return to_device(parts.processor.collate(examples, packed), device)


def _sample_losses(parts: Assembly, batch: Batch) -> Tensor:
    """Next-token loss of each sample, ``[S]``."""
    outputs = parts.network(batch, ("sequence",))
    losses = nn.functional.cross_entropy(outputs.token_logits.float(), outputs.token_targets, reduction="none")
    return losses.new_zeros(batch.num_samples).index_add(0, outputs.token_samples, losses)


def _worst(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp(min=1e-6)).max())


@torch.no_grad()
def _packing(parts: Assembly, examples: Sequence[Example]) -> str:
    """Each sample's loss alone and packed; and what changing one sample of a pack does to the others."""
    parts.network.eval()
    packed = _sample_losses(parts, _batch(parts, examples, packed=True))
    alone = torch.cat([_sample_losses(parts, _batch(parts, [example], packed=False)) for example in examples])
    worst = _worst(packed, alone)
    batch = _batch(parts, examples, packed=True)
    first = batch.segment_lengths[0] if batch.segment_lengths else 0
    batch.ids[0, 1 : first - 1] = parts.tokenizer.pad_id
    if len(examples) > 1:
        changed = _sample_losses(parts, batch)
        leak = float((changed[1:] - packed[1:]).abs().max())
        if leak != 0.0:
            raise CheckFailed(f"changing one sample of a pack changes another's loss by {leak:.2e}; expected exactly 0")
    if worst > TOLERANCE:
        raise CheckFailed(f"a sample's loss alone and packed differs by {worst:.2e} (relative); allowed {TOLERANCE:.0e}")
    return f"largest relative difference {worst:.1e}, leak 0"


@torch.no_grad()
def _padding(parts: Assembly, examples: Sequence[Example]) -> str:
    parts.network.eval()
    forward = _sample_losses(parts, _batch(parts, examples, packed=False))
    backward = _sample_losses(parts, _batch(parts, examples[::-1], packed=False)).flip(0)
    alone = torch.cat([_sample_losses(parts, _batch(parts, [example], packed=False)) for example in examples])
    worst = max(_worst(forward, alone), _worst(backward, alone))
    if worst > TOLERANCE:
        raise CheckFailed(f"padding or order changes a sample's loss by {worst:.2e} (relative); allowed {TOLERANCE:.0e}")
    return f"largest relative difference {worst:.1e}"


def _stage_losses(network: MultimodalModel, stage: StageConfig, batch: Batch) -> Losses:
    objectives = stage.parsed_objectives()
    return weighted_losses(objectives, network(batch, {entry.config.needs for entry in objectives}), batch)


def _gradients(
    parts: Assembly, network: MultimodalModel, stage: StageConfig, trained: set[str], examples: Sequence[Example]
) -> str:
    """One backward pass on real data: frozen tensors get none, every trained group gets one that is not zero."""
    set_modes(network)
    frozen = frozen_names(network)
    before = fingerprint(network, frozen)
    optimizer = stage.optimizer.build(network)
    for batch in _micro_batches(parts, stage, examples):
        losses = _stage_losses(network, stage, batch)
        if losses.total.requires_grad:
            losses.total.backward()  # type: ignore[no-untyped-call]
    moving = {name for name, p in network.named_parameters() if p.requires_grad}
    strayed = sorted(moving - trained)
    if strayed:
        raise CheckFailed(f"{len(strayed)} parameters train that the stage does not name, the first is {strayed[0]!r}")
    touched = [name for name, p in network.named_parameters() if not p.requires_grad and p.grad is not None]
    if touched:
        raise CheckFailed(f"{len(touched)} frozen parameters got a gradient, the first is {touched[0]!r}")
    _every_group(network, stage, trained)
    optimizer.step()
    if fingerprint(network, frozen) != before:
        raise CheckFailed("a frozen tensor changed in an optimizer step")
    rows = train_report(network)
    optimizer.zero_grad(set_to_none=True)
    return f"{sum(row.trained for row in rows):,} trained, {sum(row.frozen for row in rows):,} frozen, hashes equal"


def _every_group(network: MultimodalModel, stage: StageConfig, trained: set[str]) -> None:
    """Every entry of ``train`` must have a gradient; lora_b starts at zero, so lora_a's first gradient is zero."""
    gradients = {name: p.grad for name, p in network.named_parameters() if name in trained}
    without = sorted(
        name for name, grad in gradients.items() if (grad is None or not bool(grad.any())) and not name.endswith("lora_a")
    )
    groups = _module_groups(gradients)
    dead = sorted(group for group, names in groups.items() if all(name in without for name in names))
    if dead:
        raise CheckFailed(
            f"stage {stage.name!r}: no gradient reaches {', '.join(dead)}; its data or objectives never use it; "
            "take it out of 'train', or add data that needs it"
        )


def _module_groups(names: Any) -> dict[str, list[str]]:
    """Trained parameters by part: ``streams.image.encoder``, ``backbone``, ``heads.text``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        steps = name.split(".")
        depth = 3 if steps[0] == "streams" else 2 if steps[0] == "heads" else 1
        groups.setdefault(".".join(steps[:depth]), []).append(name)
    return groups


def _micro_batches(parts: Assembly, stage: StageConfig, examples: Sequence[Example]) -> Iterator[Batch]:
    """The probed samples in batches of the stage's kind, small enough for a quick backward pass."""
    for start in range(0, len(examples), 16):
        yield _batch(parts, examples[start : start + 16], packed=stage.batch.packed)


def _cost(parts: Assembly, network: MultimodalModel, stage: StageConfig, examples: Sequence[Example]) -> str:
    """Time and memory of a step, from one timed pass over the probed samples."""
    set_modes(network)
    batches = list(_micro_batches(parts, stage, examples))
    # The first pass pays for memory and kernels that later ones reuse.
    _stage_losses(network, stage, batches[0])
    started, tokens, samples = time.perf_counter(), 0, 0
    for batch in batches:
        losses = _stage_losses(network, stage, batch)
        if losses.total.requires_grad:
            losses.total.backward()  # type: ignore[no-untyped-call]
        tokens += int(batch.is_valid.sum())
        samples += batch.num_samples
    seconds = time.perf_counter() - started
    per_step = stage.batch.tokens / max(tokens, 1) if stage.batch.tokens else (stage.batch.samples or 1) / samples
    total = seconds * per_step * stage.accumulate * stage.steps
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    return (
        f"{total / 60:.1f} min for {stage.steps:,} steps ({seconds * per_step * stage.accumulate:.3f} s each); "
        f"weights {weights / 1e6:.1f} MB, gradients and optimizer {1.5 * moments / 1e6:.1f} MB, "
        f"process peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )


def _saves(parts: Assembly) -> str:
    network = copy.deepcopy(parts.network)
    merge_lora(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(network, path)
        other = assemble(parts.recipe, parts.tokenizer).network
        for parameter in other.parameters():
            parameter.data.zero_()
        read_weights(other, path)
        size = path.stat().st_size
    names = list(network.state_dict())
    if fingerprint(network, names) != fingerprint(other, names):
        raise CheckFailed("weights that were saved and loaded differ from the originals")
    return f"{len(names)} tensors, {size / 1e6:.1f} MB, equal bit for bit"


