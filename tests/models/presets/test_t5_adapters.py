"""LoRA on T5's last projection of the feed-forward layers, which stays float32 in a float16 checkpoint.

What rounding may do is measured as in ``test_half_precision``: by the distance to the exact answer, float32's over
the same rounded weights, beside the distance that the other way of computing has.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import polymodal as pm
from polymodal.core.samples import conversation
from polymodal.models.adapters import ADAPTERS, adapter_parameters, apply_adapter
from polymodal.models.compose import to_device

from . import test_t5
from .test_half_precision import FLOORS, FORMATS, distance, round_weights, wide_t5

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LORA = ADAPTERS.parse({"use": "lora", "rank": 4, "match": ["*.mlp.down_proj", "*.attention.q_proj"]})
TURN = conversation("translate: the house", answer="Das Haus ist rot.", id="turn")
SCALE = 1024.0
"""Of the loss, without which the smallest gradients leave the range of float16."""
LEAST_COSINE = {"bf16": 0.8, "fp16": 0.98}
"""Of a gradient and the exact one; the weights are random and large, so that eight bits leave this much."""


def write(folder: Path, format: str) -> Path:
    """A Flan-T5; in float16, one whose feed-forward layers overflow unless they stay float32."""
    if format == "fp16":
        return wide_t5(folder)
    test_t5.make(folder, test_t5.FLAN)
    round_weights(folder, FORMATS[format])
    return folder


def adapted(folder: Path, weights: str = "auto") -> Any:
    """The model with adapters that do something, the same ones however the weights are held."""
    model = pm.load(folder, weights=weights)
    apply_adapter(model.network.backbone, LORA)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(model.network).items():
        share = 0.02 if "down_proj" in name else 0.2
        parameter.data.copy_(share * torch.randn(parameter.shape, generator=generator))
    return model


def answer(model: Any) -> tuple[Tensor, Tensor]:
    """Logits ``[T, V]`` of the answer's tokens, and the tokens."""
    processor = model.engine.processor
    plan = processor.plan(TURN)
    batch = to_device(processor.collate([processor.load(plan)], packed=False), "cpu")
    states = model.network.states(batch)[0]
    targets = [place for place, is_target in enumerate(plan.is_supervised) if is_target]
    return model.network.token_logits(states[torch.tensor(targets) - 1]), torch.tensor([plan.ids[p] for p in targets])


def numbers(model: Any) -> np.ndarray:
    return np.asarray(answer(model)[0].float().numpy())


def loss_of(model: Any) -> Tensor:
    logits, targets = answer(model)
    return F.cross_entropy(logits.float(), targets)


@pytest.mark.parametrize("format", list(FORMATS))
def test_it_trains_in_the_format_of_each_layer(format: str, tmp_path: Path) -> None:
    folder = write(tmp_path, format)
    model, exact = adapted(folder), adapted(folder, "fp32")
    trained = adapter_parameters(model.network)
    on_wo = torch.float32 if format == "fp16" else torch.bfloat16
    assert {x.dtype for name, x in trained.items() if "down_proj" in name} == {on_wo}
    assert {x.dtype for name, x in trained.items() if "q_proj" in name} == {FORMATS[format]}
    frozen = {n: x.detach().clone() for n, x in model.network.named_parameters() if ".adapters." not in n}
    losses = []
    for each in (exact, model):
        loss = loss_of(each)
        (SCALE * loss).backward()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and abs(losses[1] - losses[0]) < 20 * FLOORS[format] * losses[0]
    for name, parameter in adapter_parameters(exact.network).items():
        assert parameter.grad is not None and trained[name].grad is not None
        mine, theirs = (x.grad.float().flatten().numpy() for x in (trained[name], parameter))
        assert np.isfinite(mine).all() and mine.any(), name
        assert np.dot(mine, theirs) > LEAST_COSINE[format] * np.linalg.norm(mine) * np.linalg.norm(theirs), name
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3 / SCALE)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(model)
        (SCALE * loss).backward()
    assert np.isfinite(loss.item()) and loss.item() < losses[1]
    assert all(torch.equal(x, frozen[n]) for n, x in model.network.named_parameters() if n in frozen)


@pytest.mark.parametrize("format", list(FORMATS))
@torch.no_grad()
def test_merged_it_answers_the_same_here_and_in_the_reference_library(format: str, tmp_path: Path) -> None:
    model = adapted(write(tmp_path / "in", format))
    before, exact = numbers(model), numbers(adapted(tmp_path / "in", "fp32"))
    off = distance(before, exact)
    assert 0 < off < 0.2 < distance(numbers(pm.load(tmp_path / "in")), exact), "the adapters do more than rounding"
    layers = model.merge()
    assert {path.split(".")[-1] for path in layers} == {"down_proj", "q_proj"}
    after = numbers(model)
    assert distance(after, exact) <= 1.5 * off + FLOORS[format]
    model.export(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, x in stored.items() if x.dtype == torch.float32}
    assert {name.split(".")[-2] for name in kept} == ({"wo"} if format == "fp16" else set())
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=FORMATS[format]).eval()
    assert distance(after, exact) <= 1.5 * distance(theirs(reference, model), exact) + FLOORS[format]
    np.testing.assert_array_equal(numbers(pm.load(tmp_path / "out")), after)


def theirs(reference: Any, model: Any) -> np.ndarray:
    plan = model.engine.processor.plan(TURN)
    ids, rest = plan.ids[: plan.num_source], plan.ids[plan.num_source :]
    logits = reference(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([rest])).logits[0]
    places = [p - plan.num_source - 1 for p, is_target in enumerate(plan.is_supervised) if is_target]
    return np.asarray(logits[torch.tensor(places)].float())


@pytest.mark.parametrize("format", list(FORMATS))
@torch.no_grad()
def test_the_adapter_goes_to_the_hub_s_library_and_back(format: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", format)
    model = adapted(folder)
    before, exact = numbers(model), numbers(adapted(folder, "fp32"))
    model.export_adapter(tmp_path / "adapter")
    reference = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=FORMATS[format]).eval()
    there = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapter").eval()
    assert distance(before, exact) <= 1.5 * distance(theirs(there, model), exact) + FLOORS[format]
    assert distance(theirs(there, model), exact) < 0.2
    again = pm.load(folder)
    again.load_adapter(tmp_path / "adapter")
    np.testing.assert_array_equal(numbers(again), before)
