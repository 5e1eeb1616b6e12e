"""What stands where words of a text are hidden, by a head of masked modelling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine
from polymodal.modalities.text.reader import TextReader
from polymodal.models.compose import to_device
from polymodal.models.compose.joint import JointRun
from polymodal.models.heads.masked_token import MaskedTokenHead

Span = tuple[int, int]


@torch.inference_mode()
def fill(
    engine: Engine, samples: Sequence[Sample], hidden: Sequence[Span], head: str = "", batch_size: int = 64
) -> list[str]:
    """The likeliest token of every hidden place, from all that the view set holds beside; joined, one text per sample.

    Args:
        engine: of a model with a masked_token head for tokens.
        samples: view sets with a text.
        hidden: of each sample, the characters ``[start, end)`` of its text; every token that holds one of them is
            hidden, and nothing else.
        head: the head's name; empty: the only one that reads tokens at the backbone.
        batch_size: samples at a time; the result of one does not depend on the others.

    Raises:
        ConfigError: if the model has no such head, or there is not one span for each sample.
        SampleError: if a sample has no text, or no token of it stands at the hidden characters.
    """
    if len(samples) != len(hidden):
        raise ConfigError(f"fill: found {len(hidden)} spans for {len(samples)} samples, expected one for each")
    reading = _head(engine, head)
    texts: list[str] = []
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        texts += _fill(engine, reading, samples[rows], hidden[rows])
    return texts


def _head(engine: Engine, name: str) -> MaskedTokenHead:
    heads = {n: head for n, head in engine.model.heads.items() if isinstance(head, MaskedTokenHead)}
    fitting = {n: head for n, head in heads.items() if head.config.predicts == "tokens"}
    if name:
        if name not in fitting:
            raise ConfigError(unknown("masked_token head for tokens", name, list(fitting)))
        return fitting[name]
    of_backbone = [head for head in fitting.values() if head.config.at == "backbone"]
    if len(of_backbone) != 1:
        raise ConfigError(
            f"found {len(of_backbone)} heads that predict tokens at the backbone, expected one; "
            f"the masked_token heads for tokens are {sorted(fitting)}"
        )
    return of_backbone[0]


def _fill(engine: Engine, head: MaskedTokenHead, samples: Sequence[Sample], hidden: Sequence[Span]) -> list[str]:
    name = head.config.stream
    layout = engine.processor.streams[name]
    reader = layout.reader
    if not isinstance(reader, TextReader):
        raise ConfigError(f"stream {name!r}: words are hidden in texts, and its reader is no text reader")
    places = [
        _places(reader, sample, layout.view or "text", span) for sample, span in zip(samples, hidden, strict=True)
    ]
    batch = to_device(engine.processor.batch(samples), engine.device)
    # Each sample has one text, so that the rows of the stream are the samples.
    is_hidden_UL = torch.zeros_like(batch.streams[name].values, dtype=torch.bool)
    for row, found in enumerate(places):
        is_hidden_UL[row, found] = True
    others = [n for n in batch.streams if n != name and n in engine.model.config.streams]
    features = {n: engine.model.encode(n, batch.streams[n]) for n in others}
    said = JointRun(engine.model, batch, features).fill(head, is_hidden_UL)
    ids: Tensor = said.predictions.argmax(1).cpu()
    lengths = [len(found) for found in places]
    return [reader.tokenizer.decode(row.tolist()).strip() for row in torch.split(ids, lengths)]


def _places(reader: TextReader, sample: Sample, view: str, span: Span) -> list[int]:
    part = sample.views.get(view)
    if not isinstance(part, Text):
        raise SampleError(sample.id, f"has no text in the view {view!r}, in which words are hidden")
    found = reader.places(part, *span)
    if not found:
        raise SampleError(
            sample.id,
            f"no token stands at the characters {span[0]} to {span[1]} of its text of {len(part.text)} characters; the "
            f"reader keeps {reader.config.max_tokens} tokens",
        )
    return found
