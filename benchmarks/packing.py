"""Packed against padded batches at equal loss: real tokens per second of whole training steps.

Every case takes the same samples through one optimizer step (forward, backward, clipping, AdamW) of the same model;
only how the samples are laid out differs.

Legend: ``B`` rows, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, shapes
from polymodal.core.batch import Batch, Example
from polymodal.modalities.processor import Processor
from polymodal.modalities.text import Tokenizer, chat_format
from polymodal.models.backbones.decoder import supervised_index
from polymodal.models.compose import ModelConfig, MultimodalModel, to_device
from polymodal.models.layers.layout import Layout
from polymodal.objectives.next_token import NextToken
from polymodal.training.optimizers import AdamW, clip_gradients

TOLERANCE = 1e-4
Loss = Callable[[Batch], tuple[Tensor, int]]
"""A batch -> the sum of its losses, and how many targets it has."""
Cases = dict[str, tuple[list[Batch], Loss]]
"""Name -> batches and how their loss is computed."""
STOCK = "padded, as drawn"
SKIPPED = "padded, padding skipped"
PACKED = "packed, 8 samples"


class Bench:
    """A model, its optimizer, and one step over a list of batches.

    Args:
        backbone: the decoder.
        tokenizer: only its number of ids matters, the samples are random.
        seed: of the weights.
    """

    def __init__(self, backbone: dict[str, Any], tokenizer: Tokenizer, seed: int = 0) -> None:
        torch.manual_seed(seed)
        recipe = shapes.text_recipe(backbone, tokenizer.size)
        self.model = MultimodalModel(ModelConfig.parse(recipe["model"]), tokenizer.size)
        self.optimizer = AdamW(lr=1e-4).build(self.model)
        self.processor = Processor(tokenizer, chat_format("turns"), {}, max_tokens=100_000)
        self.objective = NextToken()

    def batches(self, examples: Sequence[Example], groups: Sequence[Sequence[int]], packed: bool) -> list[Batch]:
        """The examples in groups, padded or packed."""
        chosen = [[examples[i] for i in group] for group in groups]
        return [to_device(self.processor.collate(group, packed), "cpu") for group in chosen]

    def step(self, batches: Sequence[Batch], loss: Loss) -> float:
        """Train once on all batches together; returns the mean loss over all their targets."""
        losses = [loss(batch) for batch in batches]
        count = sum(targets for _, targets in losses)
        return sum(float(total.detach()) for total, _ in losses) / count

    def train(self, batches: Sequence[Batch], loss: Loss) -> float:
        """One optimizer step over all batches; returns the mean loss over all their targets."""
        count = sum(int(batch.is_supervised.sum()) for batch in batches)
        mean = 0.0
        for batch in batches:
            total, _ = loss(batch)
            (total / count).backward()
            mean += float(total.detach()) / count
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def own_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The sum of the losses as a recipe's run computes it."""
        report = self.objective(self.model(batch, ("sequence",)), batch)
        return report.total * report.count, report.count

    def stock_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The same, with logits at every position, padding too, as a stock causal language model computes it."""
        states_BTD = self.model.states(batch)
        logits_BTV = self.model.token_logits(states_BTD)[:, :-1].reshape(
            -1, self.model.decoder.embed_tokens.num_embeddings
        )
        labels = torch.where(batch.is_supervised, batch.ids, -100)[:, 1:].reshape(-1)
        return F.cross_entropy(logits_BTV, labels, ignore_index=-100, reduction="sum"), int(batch.is_supervised.sum())

    def dense_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Packed with a dense mask over the whole pack: what must not be done, for comparison."""
        x_BTD = self.model.embed_sequence(batch)
        states_BTD = self.model.decoder(x_BTD, DenseLayout(batch))
        source, targets, _ = supervised_index(batch)
        logits = self.model.token_logits(states_BTD.flatten(0, 1)[source])
        return F.cross_entropy(logits, targets, reduction="sum"), len(targets)


class DenseLayout(Layout):
    """One row with a dense block-diagonal causal mask ``[1, 1, T, T]``."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(causal=True, positions_BT=batch.positions)
        owner = torch.repeat_interleave(torch.arange(len(batch.segment_lengths)), torch.tensor(batch.segment_lengths))
        may_attend = (owner[:, None] == owner[None, :]).tril()
        self.__dict__["mask"] = may_attend[None, None]


@contextmanager
def watched_attention() -> Iterator[dict[str, float]]:
    """Notes, while open, whether any mask reaches attention and how many scores it computes (queries x keys)."""
    seen = {"masks": 0.0, "scores": 0.0}
    original = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
        seen["masks"] += mask is not None or more.get("attn_mask") is not None
        seen["scores"] += query.shape[0] * query.shape[2] * key.shape[2]
        return original(query, key, value, mask, *rest, **more)

    F.scaled_dot_product_attention = spy
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = original


def as_named(name: str) -> AbstractContextManager[None]:
    """Compute padding in the cases that say so by not saying otherwise."""
    return nullcontext() if name == SKIPPED else shapes.padding_computed()


def groups_of(order: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive groups of ``size``."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def cases(bench: Bench, examples: Sequence[Example]) -> Cases:
    """Name -> batches and how their loss is computed."""
    lengths = [example.plan.num_tokens for example in examples]
    drawn, by_length = list(range(len(lengths))), sorted(range(len(lengths)), key=lambda i: lengths[i])
    half = len(lengths) // 2
    padded = bench.batches(examples, groups_of(drawn, half), packed=False)
    ordered = bench.batches(examples, groups_of(by_length, half), packed=False)
    # The packer puts the samples of a pack in order of length, so that neighbours share an attention call.
    pairs = [sorted(group, key=lambda i: lengths[i]) for group in groups_of(drawn, half)]
    return {
        STOCK: (padded, bench.stock_loss),
        "padded, logits at targets": (padded, bench.own_loss),
        "padded, sorted by length": (ordered, bench.stock_loss),
        SKIPPED: (padded, bench.own_loss),
        PACKED: (bench.batches(examples, pairs, packed=True), bench.own_loss),
        "packed, 16 samples": (bench.batches(examples, [by_length], packed=True), bench.own_loss),
        "packed, 16 samples, dense mask": (bench.batches(examples, [by_length], packed=True), bench.dense_loss),
    }


def prove(bench: Bench, every: Cases) -> dict[str, dict[str, Any]]:
    """The loss of each case at equal weights, its share of padding, its masks and its attention scores.

    Raises:
        AssertionError: if losses differ by more than 1e-4, or a mask reaches the attention of a packed batch.
    """
    proofs: dict[str, dict[str, Any]] = {}
    for name, (batches, loss) in every.items():
        with watched_attention() as seen, torch.no_grad(), as_named(name):
            value = bench.step(batches, loss)
        slots, real = sum(b.ids.numel() for b in batches), sum(int(b.is_valid.sum()) for b in batches)
        proofs[name] = {"loss": f"{value:.5f}", "padding": f"{1 - real / slots:.0%}", "masks": int(seen["masks"])}
        proofs[name]["scores"] = f"{seen['scores'] / 1e6:.1f}M"
        assert abs(value - float(proofs[STOCK]["loss"])) < TOLERANCE, f"{name}: loss {value}, {STOCK}: {proofs[STOCK]}"
        if name.startswith("packed") and "dense" not in name:
            assert seen["masks"] == 0, f"{name}: {seen['masks']} masks reached attention, expected none"
    return proofs


def run(options: harness.Options) -> harness.Result:
    """Measure."""
    size = "2M" if options.quick else "12.5M"
    backbone, vocab_size = shapes.DECODERS[size]
    lengths = [length // 8 for length in shapes.LENGTHS] if options.quick else shapes.LENGTHS
    bench = Bench(backbone, shapes.tokenizer(vocab_size))
    rng = np.random.default_rng(0)
    examples = [shapes.plain_example(rng, length, bench.processor.tokenizer.size) for length in lengths]
    every = cases(bench, examples)
    proofs = prove(bench, every)

    def timed(name: str, batches: list[Batch], loss: Loss) -> Callable[[], float]:
        def once() -> float:
            with as_named(name):
                bench.train(batches, loss)
            return float(sum(lengths))

        return once

    rows = harness.interleave({name: timed(name, *case) for name, case in every.items()}, options.repeat)
    for row in rows:
        row.extra = proofs[row.name]
    count = sum(parameter.numel() for parameter in bench.model.parameters())
    result = harness.Result("packing", "Packed against padded, at equal loss")
    title = f"{count / 1e6:.1f}M parameters, {len(lengths)} samples, {sum(lengths)} tokens a step"
    result.add_rows(title, rows, "real tokens/s", STOCK)
    result.add_goal("packed over padded, shuffled", 2.5, harness.cpu_ratio(rows, PACKED, STOCK))
    result.notes += [
        f"'{STOCK}' computes logits at every position, as a stock causal language model does; "
        f"'logits at targets' is our model on the same batches; '{SKIPPED}' is how it really treats padded batches: "
        "padding is taken out before the blocks and put back after them",
        "losses are taken at equal weights before the timing and agree within 1e-4; "
        "masks: masks that reached attention; scores: queries x keys over all layers and calls",
        f"an average shuffle of these lengths pads {mean_waste(lengths):.0%}",
    ]
    return result


def mean_waste(lengths: Sequence[int], shuffles: int = 1000) -> float:
    """Share of padding of two padded batches, over random shuffles."""
    rng, half = np.random.default_rng(0), len(lengths) // 2
    orders = [rng.permutation(lengths) for _ in range(shuffles)]
    return float(np.mean([1 - sum(lengths) / (half * (order[:half].max() + order[half:].max())) for order in orders]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = harness.parse_options(__doc__, argv, repeat=7)
    run(options).finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
