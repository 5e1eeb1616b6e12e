"""Published models in the half precision that they are stored in, against the reference library in the same.

Rounding moves both. What counts is the distance to the exact answer, that of the reference in float32 over the same
rounded weights: ours may be no farther from it than 1.5 times the reference's own distance, and a little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymodal as pm
from polymodal.models.presets import ARCHITECTURES
from polymodal.models.presets.blip2 import BLIP2
from polymodal.models.presets.blip2_retrieval import BLIP2_RETRIEVAL
from polymodal.models.presets.instructblip import INSTRUCTBLIP
from polymodal.models.presets.minigpt4 import MINIGPT4
from polymodal.models.presets.t5 import T5

from . import test_t5
from .precision_cases import CASES
from .reference import assert_same_weights

KEEPING: dict[str, str] = {
    T5.name: "T5ForConditionalGeneration",
    BLIP2.name: "Blip2ForConditionalGeneration",
    MINIGPT4.name: "Blip2ForConditionalGeneration",
    BLIP2_RETRIEVAL.name: "Blip2ForImageTextRetrieval",
    INSTRUCTBLIP.name: "InstructBlipForConditionalGeneration",
}
"""Architectures that keep tensors in float32, and the reference library's classes."""
IN_FLOAT16 = ("vit", "llama", "whisper", *(name for name in CASES if name.startswith(("t5", "blip2", "instructblip"))))
"""Those that keep tensors in float32 there, and a few others; all were compared once."""
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOORS = {"bf16": 2e-3, "fp16": 3e-4}
"""About half of the smallest step of each format."""


def round_weights(folder: Path, dtype: torch.dtype) -> None:
    """Store the floats of a checkpoint in another format, as half-precision checkpoints on the hub are stored."""
    path = folder / "model.safetensors"
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))


def caster(dtype: torch.dtype) -> Callable[[Any], Any]:
    """What casts the floats of inputs: the reference takes none of another format."""

    def cast(given: Any) -> Any:
        if isinstance(given, Tensor):
            return given.to(dtype) if given.is_floating_point() else given
        return type(given)({name: cast(value) for name, value in given.items()})

    return cast


def joined(outputs: Any) -> np.ndarray:
    """Outputs in one row."""
    several = outputs if isinstance(outputs, list) else [outputs]
    rows = [np.asarray(x.float() if isinstance(x, Tensor) else x, np.float64).reshape(-1) for x in several]
    return np.concatenate(rows)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape, f"found shape {one.shape}, expected {other.shape}"
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize(
    ("format", "name"), [*(("bf16", name) for name in CASES), *(("fp16", name) for name in IN_FLOAT16)]
)
def test_half_precision_is_as_exact_as_the_reference(format: str, name: str, tmp_path: Path) -> None:
    case, dtype = CASES[name], FORMATS[format]
    case.write(tmp_path)
    round_weights(tmp_path, dtype)
    outputs = {}
    with torch.inference_mode():
        for computed in (torch.float32, dtype):
            reference = getattr(transformers, case.kind).from_pretrained(tmp_path, dtype=computed).eval()
            outputs[computed] = joined(case.theirs(reference, caster(computed), tmp_path))
        model = pm.load(tmp_path)
        ours = joined(case.ours(model))
    assert dtype in {parameter.dtype for parameter in model.network.parameters()}
    mine, others = distance(ours, outputs[torch.float32]), distance(outputs[dtype], outputs[torch.float32])
    assert 0 < others < 0.2, "the reference must be moved by rounding, and not lost in it"
    assert mine <= 1.5 * others + FLOORS[format], f"found an error of {mine:.2e}, the reference's is {others:.2e}"


@pytest.mark.parametrize("name", KEEPING)
def test_the_same_tensors_stay_float32_as_in_the_reference(name: str) -> None:
    kept = set(getattr(transformers, KEEPING[name])._keep_in_fp32_modules)
    # A T5 within brings its own.
    of_language = set(T5.float32) if name in (T5.name, BLIP2.name, INSTRUCTBLIP.name) else set()
    assert set(ARCHITECTURES[name].float32) == kept | of_language


def test_only_these_architectures_keep_any() -> None:
    assert {name for name, architecture in ARCHITECTURES.items() if architecture.float32} == set(KEEPING)


def wide_t5(folder: Path) -> Path:
    """A T5 whose feed-forward layers give values that float16 cannot hold, as Flan-T5's do; stored in float16."""
    test_t5.make(folder, test_t5.FLAN)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("wo.weight"):
            tensors[name] *= 2e4
    save_file(tensors, path, metadata={"format": "pt"})
    round_weights(folder, torch.float16)
    return folder


def test_t5_does_not_overflow_in_float16(tmp_path: Path) -> None:
    folder = wide_t5(tmp_path)
    model = pm.load(folder)
    kept = {name for name, x in model.network.named_parameters() if x.dtype == torch.float32}
    assert len(kept) == 5 and all(name.endswith("mlp.down_proj.weight") for name in kept)
    found = joined(CASES["t5-flan"].ours(model))
    with torch.inference_mode():
        answers = {}
        for dtype in (torch.float16, torch.float32):
            reference = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
            answers[dtype] = joined(CASES["t5-flan"].theirs(reference, None, folder))
    assert np.isfinite(found).all()
    off = distance(answers[torch.float16], answers[torch.float32])
    assert distance(found, answers[torch.float32]) <= 1.5 * off + FLOORS["fp16"]
    for parameter in model.network.parameters():
        parameter.data = parameter.data.half()
    assert not np.isfinite(joined(CASES["t5-flan"].ours(model))).all(), "without them it overflows"


def test_what_stays_float32_is_exported_and_written_with(tmp_path: Path) -> None:
    folder = wide_t5(tmp_path / "in")
    model = pm.load(folder)
    model.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    again, before = (transformers.T5ForConditionalGeneration.from_pretrained(x) for x in (tmp_path / "out", folder))
    assert_same_weights(again, before)
    assert (
        model.chat("What?", max_new_tokens=4).tokens == pm.load(tmp_path / "out").chat("What?", max_new_tokens=4).tokens
    )
