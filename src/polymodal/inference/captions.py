"""Captions by an encoder backbone: its text sees the medium and what stands before, and grows by a token at a time.

Legend: ``S`` samples, ``T`` tokens written so far, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine, Finish
from polymodal.inference.sampling import Sampling, draw, make_generator
from polymodal.modalities.text import TextReader, Tokenizer
from polymodal.models.compose import to_device
from polymodal.models.compose.joint import JointRun, caption_head
from polymodal.models.compose.writing import WritingRun
from polymodal.models.heads.masked_token import MaskedTokenHead


@dataclass(slots=True)
class Written:
    """A caption: its token ids without start and end, why it ended, and its text."""

    ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Writer:
    """What writes: the caption's head and stream, that stream's tokenizer, and the longest text."""

    head: MaskedTokenHead
    stream: str
    tokenizer: Tokenizer
    max_tokens: int


@torch.inference_mode()
def write_captions(
    engine: Engine, media: Sequence[Media | None], sampling: Sampling, batch_size: int = 64
) -> list[Written]:
    """A caption of each medium; the medium and each token are read once, and their keys and values kept.

    Source: BLIP, arXiv 2201.12086, section 3.1: a start token, causal self-attention, cross-attention to the image, an
    end token.

    Args:
        engine: of a model with an encoder backbone that the objective ``caption`` has trained.
        media: of the modalities of the other streams; None stands for no medium: what the words alone would be.
        sampling: how to draw.
        batch_size: media at a time; the greedy caption of one does not depend on the others.

    Raises:
        ConfigError: if the model cannot write captions, saying what it lacks.
        SampleError: if the model does not take a medium.
        MediaError: if one cannot be used.
    """
    writer = _writer(engine)
    found = [Written() for _ in media]
    blind = [index for index, medium in enumerate(media) if medium is None]
    seeing = [index for index, medium in enumerate(media) if medium is not None]
    generator = make_generator(sampling, engine.device)
    for rows in (blind, seeing):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            written = _write(engine, writer, [media[i] for i in chosen], sampling, generator)
            for row, caption in zip(chosen, written, strict=True):
                found[row] = caption
    return found


def _writer(engine: Engine) -> _Writer:
    head = caption_head(engine.model)
    stream = head.config.stream
    reader = engine.processor.streams[stream].reader
    assert isinstance(reader, TextReader)
    own = reader.tokenizer
    if not (reader.config.add_special and own.prefix and own.suffix):
        raise ConfigError(
            f"captions of stream {stream!r}: its reader puts no start and end token around a text, so that a caption "
            "could neither begin nor end; train with reader: {use: text, add_special: true}"
        )
    return _Writer(head, stream, own, reader.config.max_tokens)


def _write(
    engine: Engine,
    writer: _Writer,
    media: Sequence[Media | None],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> list[Written]:
    """Captions of media, all of which are there, or none."""
    # The text is there for a batch to hold something; what is written begins anew.
    views = [{"text": Text("a")} if medium is None else {medium.modality: medium} for medium in media]
    samples = [Sample(f"medium {place}", views=there) for place, there in enumerate(views)]
    batch = to_device(engine.processor.batch(samples), engine.device)
    seen = {name: engine.model.encode(name, x) for name, x in batch.streams.items() if name != writer.stream}
    joint = JointRun(engine.model, batch, seen)
    tokens, is_valid = joint.lay_out(seen) if seen else ({}, {})
    start, end = writer.tokenizer.prefix, writer.tokenizer.suffix[0]
    num_new = min(sampling.max_new_tokens, writer.max_tokens - len(start))
    run = WritingRun(joint, writer.head, tokens, is_valid, (len(media), len(start) + num_new))
    ids_ST = torch.tensor([start] * len(media), device=engine.device)
    found = [Written() for _ in media]
    alive = list(range(len(media)))
    for _ in range(num_new):
        token_S = draw(run.logits(ids_ST), sampling, generator)
        going = (token_S != end).nonzero().squeeze(1)
        for row in (token_S == end).nonzero().squeeze(1).tolist():
            found[alive[row]].finish = "stop"
        for row in going.tolist():
            found[alive[row]].ids.append(int(token_S[row]))
        # Finished rows leave, so that no step is spent on them.
        ids_ST = torch.cat([ids_ST, token_S[:, None]], dim=1)[going]
        run.select(going)
        alive = [alive[row] for row in going.tolist()]
        if not alive:
            break
    for caption in found:
        caption.text = writer.tokenizer.decode(caption.ids).strip()
    return found
