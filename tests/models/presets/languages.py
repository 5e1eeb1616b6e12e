"""Small language models and their tokenizer, for parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from .reference import randomise, save_reference

ROWS = 300
"""Rows of every embedding here: more than the tokenizer has ids, as in Qwen's checkpoints."""


def byte_tokenizer(bos: str | None = "<s>") -> Any:
    """A byte tokenizer of the reference library, with ``<s>``, ``</s>`` and ``<pad>``."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<pad>")])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def save_language(model: Any, folder: Path, seed: int = 0) -> Path:
    """Telling weights, sharp enough that greedy choices differ from step to step, and the tokenizer."""
    randomise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = [257, 17]
    model.generation_config.pad_token_id = 258
    return save_reference(model, folder, byte_tokenizer())
