"""A small WordPiece tokenizer in BERT's layout."""

from __future__ import annotations

from typing import Any

CONTROLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "red", "dog", "cat", "on", "the", "grass", "what", "is", "it", "?", ".", "##s")


def bert_tokenizer(max_tokens: int) -> Any:
    """BERT's tokenizer class over letters and a few words."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*CONTROLS, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=max_tokens)
