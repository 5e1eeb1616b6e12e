"""Prompts of texts and pictures as both sides take them, and what they must make of them, for parity tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal as pm
from polymodal.core.batch import Plan
from polymodal.core.samples import conversation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import to_device

from .reference import assert_close

transformers = pytest.importorskip("transformers")


def asked(prompt: Sequence[Any]) -> pm.Sample:
    """A user's turn of texts and pictures."""
    return conversation(*(part if isinstance(part, str) else pm.Image(part) for part in prompt))


def inputs_of(folder: Path, prompt: Sequence[Any]) -> Any:
    """The same turn as the processor of the reference's folder lays it out."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in prompt]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    pictures = [part for part in prompt if not isinstance(part, str)]
    return processor(images=pictures or None, text=text, return_tensors="pt")


def assert_same_logits(model: pm.Model, plan: Plan, reference: Any, inputs: Mapping[str, Any]) -> None:
    """The logits at every place of a prompt equal the reference's."""
    batch = to_device(model.engine.processor.collate([model.engine.processor.load(plan)], packed=False), "cpu")
    with torch.inference_mode():
        assert_close(model.network.token_logits(model.network.states(batch)), reference(**inputs).logits)


def assert_same_answers(
    model: pm.Model, samples: Sequence[pm.Sample], reference: Any, inputs: Sequence[Mapping[str, Any]]
) -> None:
    """Greedy answers of up to 32 tokens equal the reference's; all differ, and not all end early."""
    found = model.engine.generate(samples, Sampling(max_new_tokens=32))
    ends = reference.generation_config.eos_token_id
    for row, answer in zip(inputs, found, strict=True):
        with torch.inference_mode():
            ids = reference.generate(**row, max_new_tokens=32, do_sample=False)[0, row["input_ids"].shape[1] :].tolist()
        end = next((place for place, id in enumerate(ids) if id in ends), len(ids))
        assert answer.ids == ids[:end]
    assert len({tuple(answer.ids) for answer in found}) == len(samples)
    assert max(len(answer.ids) for answer in found) == 32
