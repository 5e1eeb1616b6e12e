"""What was said in recordings, by a head for connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polymodal.core.parts import Part
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine
from polymodal.models.compose import to_device
from polymodal.models.compose.readouts import ctc_head
from polymodal.models.heads.ctc import greedy_paths


@torch.inference_mode()
def transcribe_ctc(engine: Engine, parts: Sequence[Part], batch_size: int = 8) -> list[str]:
    """The greedy transcript of each recording: the likeliest token of every feature, repeats and blanks dropped.

    Args:
        engine: of a model with a ctc head.
        parts: recordings, of the modality that the head's stream takes.
        batch_size: recordings at a time, of similar length; the transcript of one does not depend on the others.

    Raises:
        ConfigError: if the model has no ctc head.
        SampleError: if the stream does not take a part.
        MediaError: if a recording cannot be used.
    """
    head = ctc_head(engine.model).config
    samples = [Sample(f"part {index}", views={part.modality: part}) for index, part in enumerate(parts)]
    plans = [engine.processor.plan(sample) for sample in samples]
    order = sorted(range(len(plans)), key=lambda i: sum(sum(item[1]) for item in plans[i].items[head.stream]))
    texts = [""] * len(plans)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        examples = [engine.processor.load(plans[i]) for i in rows]
        batch = to_device(engine.processor.collate(examples, packed=False), engine.device)
        found = engine.model(batch, passes=("ctc",)).ctc
        for row, path in zip(rows, greedy_paths(found.logits, found.lengths), strict=True):
            texts[row] = head.decode(path)
    return texts
