"""A small tokenizer in CLIP's layout."""

from __future__ import annotations

from typing import Any

WORDS = ("a", "red", "dog", "cat", "on", "the", "grass")


def clip_tokenizer(max_tokens: int) -> Any:
    """CLIP's tokenizer class over letters and a few merges; the end token has the highest id."""
    import transformers

    pieces: dict[str, int] = {}
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.!":
        pieces[letter] = len(pieces)
        pieces[f"{letter}</w>"] = len(pieces)
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[-2], parts[-1]))
            parts[-2:] = [parts[-2] + parts[-1]]
            pieces.setdefault(parts[-1], len(pieces))
    for control in ("<|startoftext|>", "<|endoftext|>"):
        pieces[control] = len(pieces)
    return transformers.CLIPTokenizer(
        vocab=pieces, merges=list(dict.fromkeys(merges)), model_max_length=max_tokens, pad_token="<|endoftext|>"
    )
