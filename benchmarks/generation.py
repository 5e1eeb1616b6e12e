"""Answering: decoding with and without the key-value cache, and the first token of a repeated question about an image.

Greedy tokens of every case are asserted to be equal. A third table times exact search.

Legend: ``N`` vectors, ``D`` width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks import harness, shapes
from polymodal.core.parts import Image
from polymodal.core.samples import Sample, conversation
from polymodal.inference.engine import Engine
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import to_device
from polymodal.models.layers.layout import Layout
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.loading import load_recipe
from polymodal.retrieval.index import FlatIndex, Signature

CACHED, UNCACHED = "key-value cache", "no cache: the whole sequence every token"
WITHOUT, WITH, FRESH = "no prefix cache", "prefix cache, image seen before", "prefix cache, image not seen before"


def build(quick: bool) -> Assembly:
    """A vision-language model with random weights."""
    vit = {"width": 32, "depth": 2, "heads": 2} if quick else {"width": 512, "depth": 12, "heads": 8}
    backbone = shapes.DECODERS["2M" if quick else "47M"][0]
    model = shapes.vision_recipe(64 if quick else 256, 16, vit, {"use": "mlp"}, backbone)
    return assemble(load_recipe({"name": "generation", "model": model}), shapes.tokenizer(512))


@torch.inference_mode()
def uncached(engine: Engine, sample: Sample, count: int) -> list[int]:
    """Greedy decoding that runs the whole sequence for every token."""
    plan, ids = engine.processor.plan(sample, prompt=True), list[int]()
    batch = to_device(engine.processor.collate([engine.processor.load(plan)], packed=False), engine.device)
    features = {name: engine.model.encode(name, stream) for name, stream in batch.streams.items()}
    x_BTD = engine.model.embed_sequence(batch, features)
    end = engine.processor.tokenizer.control(engine.processor.chat.end)
    while len(ids) < count:
        states = engine.model.decoder(x_BTD, Layout(causal=True, positions_BT=torch.arange(x_BTD.shape[1])[None]))
        token = int(engine.model.token_logits(states[:, -1]).argmax(-1))
        if token == end:
            break
        ids.append(token)
        x_BTD = torch.cat((x_BTD, engine.model.decoder.embed(torch.tensor([[token]]))), dim=1)
    return ids


def picture(seed: int, side: int) -> Image:
    """Noise."""
    return Image(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def decoding(options: harness.Options, parts: Assembly, result: harness.Result) -> None:
    """Tokens per second of one answer, and of eight at once."""
    count, engine = (6 if options.quick else 48), Engine(parts.network, parts.processor, prefix_bytes=0)
    sample = conversation(picture(0, 64), "What is it?", id="question")
    eight = [conversation(picture(i, 64), "What is it?", id=str(i)) for i in range(8)]
    sampling = Sampling(max_new_tokens=count)

    def cached() -> float:
        return float(len(list(engine.stream(sample, sampling))))

    def batched() -> float:
        return float(sum(len(found.ids) for found in engine.generate(eight, sampling)))

    assert list(engine.stream(sample, sampling)) == uncached(engine, sample, count), "cached and uncached tokens differ"
    runs: dict[str, Callable[[], float]] = {UNCACHED: lambda: float(len(uncached(engine, sample, count)))}
    runs |= {CACHED: cached, "key-value cache, 8 at once": batched}
    rows = harness.interleave(runs, options.repeat)
    size = sum(parameter.numel() for parameter in parts.network.parameters()) / 1e6
    tokens = engine.processor.plan(sample, prompt=True).num_tokens
    title = f"Decoding: {size:.0f}M parameters, prompt of {tokens} tokens, {count} new tokens (encoding included)"
    result.add_rows(title, rows, "new tokens/s", UNCACHED)


def repeated(options: harness.Options, parts: Assembly, result: harness.Result) -> None:
    """First tokens of new questions about an image."""
    side = 64 if options.quick else 640
    plain = Engine(parts.network, parts.processor, prefix_bytes=0)
    caching = Engine(parts.network, parts.processor)
    image, sampling = picture(1, side), Sampling(max_new_tokens=1)
    questions = iter(shapes.words(10_000, seed=3))
    asked = iter(range(100, 100_000))

    def first(engine: Engine, shown: Image) -> list[int]:
        return list(engine.stream(conversation(shown, f"What is {next(questions)}?"), sampling))

    def once(engine: Engine, shown: Callable[[], Image]) -> float:
        first(engine, shown())
        return 1.0

    same = conversation(image, "What is it?")
    first(caching, image)
    assert list(plain.stream(same, sampling)) == list(caching.stream(same, sampling)), (
        "a reused prefix changes the answer"
    )
    runs: dict[str, Callable[[], float]] = {
        WITHOUT: lambda: once(plain, lambda: image),
        WITH: lambda: once(caching, lambda: image),
        FRESH: lambda: once(caching, lambda: picture(next(asked), side)),
    }
    rows = harness.interleave(runs, options.repeat)
    result.add_rows("First token of a new question about an image", rows, "first tokens/s", WITHOUT)
    result.add_goal("first token about an image seen before", 5.0, harness.cpu_ratio(rows, WITH, WITHOUT))


def searching(options: harness.Options, result: harness.Result) -> None:
    """Exact search against the bare matrix product with a partial sort."""
    count, dim = (500, 16) if options.quick else (50_000, 256)
    vectors_ND = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    index = FlatIndex(Signature(model="benchmark", revision="0", dim=dim))
    index.add([str(row) for row in range(count)], vectors_ND)
    queries = vectors_ND[:16]

    def bare() -> float:
        scores = queries @ vectors_ND.T
        np.argpartition(-scores, 10, axis=1)[:, :10]
        return float(len(queries))

    def search() -> float:
        hits = index.search(queries, 10)
        assert [found[0].key for found in hits] == [str(row) for row in range(len(queries))]
        return float(len(queries))

    rows = harness.interleave({"bare product and partition": bare, "FlatIndex.search": search}, options.repeat)
    result.add_rows(f"Exact search: {count:,} vectors of {dim}, 16 queries at once", rows, "queries/s", rows[0].name)


def run(options: harness.Options) -> harness.Result:
    """Measure."""
    result = harness.Result("generation", "Answering and searching")
    parts = build(options.quick)
    parts.network.eval()
    decoding(options, parts, result)
    repeated(options, parts, result)
    searching(options, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = harness.parse_options(__doc__, argv, repeat=7)
    run(options).finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
