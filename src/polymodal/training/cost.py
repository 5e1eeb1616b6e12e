"""What a stage will take, from one pass over one of its own batches; and what it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from polymodal.training.optimizers import Lion
from polymodal.training.progress import memory_bytes


@dataclass(frozen=True, slots=True)
class Cost:
    """The predicted cost of a stage.

    Args:
        num_steps: its steps; step_s: seconds of one.
        weights_bytes: the model.
        training_bytes: gradients and optimizer state of what trains.
        activation_bytes: what one batch keeps for its backward pass.
        base_bytes: the process (or, on a GPU, what is allocated) before the stage, the model included.
    """

    num_steps: int
    step_s: float
    weights_bytes: int
    training_bytes: int
    activation_bytes: int
    base_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds of the whole stage."""
        return self.num_steps * self.step_s

    @property
    def peak_bytes(self) -> int:
        """The most memory at a time."""
        return self.base_bytes + self.training_bytes + self.activation_bytes

    def __str__(self) -> str:
        return (
            f"{duration(self.total_s)} for {self.num_steps:,} steps ({self.step_s:.3f} s each), peak memory "
            f"{mebibytes(self.peak_bytes)} (weights {mebibytes(self.weights_bytes)}, gradients and optimizer "
            f"{mebibytes(self.training_bytes)}, activations {mebibytes(self.activation_bytes)})"
        )


def duration(seconds: float) -> str:
    """``12.3 min``; below two minutes ``45.6 s``."""
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def mebibytes(size: int) -> str:
    """``1,234 MiB``; one decimal below ten."""
    value = size / 2**20
    return f"{value:,.0f} MiB" if value >= 10 else f"{value:.1f} MiB"


def predict_cost(
    model: nn.Module,
    optimizer: Optimizer,
    backwards: Iterable[tuple[float, Callable[[], object]]],
    *,
    batches_per_step: int,
    num_steps: int,
) -> Cost:
    """Run every kind of batch twice: once to warm up and to count what it keeps, once to time it.

    Memory is that of the kind that keeps most, time the mean over the kinds. Nothing changes: gradients are dropped,
    and random generators stand where they stood. The time lacks the optimizer's own step.

    Args:
        model: with what trains marked.
        optimizer: of the stage.
        backwards: per kind of batch, its share of the batches and the forward and backward pass of one; at least one.
        batches_per_step: batches that make a step.
        num_steps: steps of the stage.
    """
    base = _process_bytes()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    activation_bytes, seconds, total = 0, 0.0, 0.0
    with torch.random.fork_rng(devices=gpus):
        for share, backward in backwards:
            activation_bytes = max(activation_bytes, _kept_bytes(model, backward))
            _wait(gpus)
            started = time.perf_counter()
            backward()
            _wait(gpus)
            seconds, total = seconds + share * (time.perf_counter() - started), total + share
    optimizer.zero_grad(set_to_none=True)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    copies = 2 if isinstance(optimizer, Lion) else 3
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    step_s = seconds / total * batches_per_step
    return Cost(num_steps, step_s, weights, copies * trained, activation_bytes, base)


def _kept_bytes(model: nn.Module, backward: Callable[[], object]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, weights apart, each memory counted once.

    With activation checkpointing these are the tensors between blocks; what one block makes again is not in them.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = max(storage.nbytes(), kept.get(storage.data_ptr(), 0))
        return tensor

    def unpack(tensor: Tensor) -> Any:
        return tensor

    with saved_tensors_hooks(pack, unpack):
        backward()
    return sum(kept.values())


def _wait(gpus: range) -> None:
    if len(gpus) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _process_bytes() -> int:
    found = memory_bytes()
    return torch.cuda.memory_allocated() if "CUDA" in found else found.get("RSS", 0)


def peak_bytes() -> int:
    """The most memory that this process held so far; on a GPU, the most that torch held there."""
    found = memory_bytes()
    if "CUDA" in found:
        return found["CUDA"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
