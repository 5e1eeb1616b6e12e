"""Training a tokenizer of our own."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from polymodal.core.errors import ConfigError
from polymodal.modalities.text.tokenizer import END, MEDIA, OWN_END, OWN_START, PAD, START, Tokenizer


def train_bpe(
    texts: Iterable[str], vocab_size: int, controls: Iterable[str] = (), *, framed: bool = False
) -> Tokenizer:
    """Train a byte-level BPE: every text can be encoded, and decoding gives it back exactly.

    Source: Sennrich 1508.07909; byte-level as in GPT-2. Digits are single tokens.

    Args:
        texts: the corpus.
        vocab_size: ids in all, the 256 bytes and the control tokens included.
        controls: control tokens besides the standard ones.
        framed: whether the tokenizer itself puts ``<|start|>`` before a text and ``<|end|>`` behind it, as BERT's does
            with its [CLS] and [SEP]; readers ask for them by ``add_special``.

    Raises:
        ConfigError: if ``vocab_size`` leaves no room for the bytes and the control tokens.
    """
    own = [OWN_END if name == END else name for name in controls if name != START]
    names = list(dict.fromkeys([PAD, MEDIA, *own, *((OWN_START, OWN_END) if framed else ())]))
    if vocab_size < 256 + len(names):
        raise ConfigError(
            f"tokenizer.vocab_size: found {vocab_size}, expected at least {256 + len(names)} "
            f"(256 bytes and {len(names)} control tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if framed:
        ids = [(name, backend.token_to_id(name)) for name in (OWN_START, OWN_END)]
        backend.post_processor = processors.TemplateProcessing(f"{OWN_START} $A {OWN_END}", special_tokens=ids)
    return Tokenizer(backend, names)
