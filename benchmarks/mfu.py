"""Model FLOPs utilisation of training nanoVLM's shape on one GPU, in bfloat16.

The shape: SigLIP-B/16 at 512 px (86M), pixel shuffle by 4 to 64 tokens (7M), SmolLM2-135M; everything trains.
Counted are the matrix products of the mathematics only: forward and twice that backward; causal attention by half its
square; the vocabulary at targets. Recomputation, padding, norms and the optimizer count as nothing.

Legend: ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import harness, shapes
from polymodal.core.batch import Batch, Example, ModelInput, Plan, Span
from polymodal.modalities.processor import Processor
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.layers.transformer import TransformerConfig
from polymodal.objectives.next_token import NextToken
from polymodal.recipes.assemble import make_processor
from polymodal.recipes.loading import load_recipe
from polymodal.training.optimizers import AdamW, clip_gradients
from polymodal.training.precision import ComputeConfig

PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.2}
"""Dense bfloat16 TFLOP/s by name (data sheets; the SXM forms of H100 and H200)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained: the recipe's model, samples per step, text tokens per sample."""

    model: dict[str, Any]
    samples: int
    text_tokens: int


def nano_vlm(samples: int) -> Shape:
    """228M parameters."""
    vit = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}
    backbone = shapes.decoder(576, 30, 9, 1536, max_tokens=8192)
    backbone["transformer"] |= {"kv_heads": 3, "rope_theta": 100_000.0}
    model = shapes.vision_recipe(512, 16, vit, {"use": "pixel_shuffle", "factor": 4}, backbone)
    return Shape(model, samples, 64)


def tiny(samples: int) -> Shape:
    """A few thousand parameters, for trying it out."""
    backbone = shapes.decoder(32, 2, 2, 64, max_tokens=8192)
    vit = {"width": 32, "depth": 2, "heads": 2}
    return Shape(shapes.vision_recipe(64, 16, vit, {"use": "pixel_shuffle", "factor": 2}, backbone), samples, 8)


def stack_flops(config: TransformerConfig, rows: int, tokens: int, causal: bool) -> float:
    """Forward FLOPs of a transformer over ``rows`` sequences of ``tokens``: two per multiply-add."""
    inputs = config.width * config.size_of_head * (config.heads + 2 * config.num_kv_heads)
    scores = 2 * tokens * config.heads * config.size_of_head * (0.5 if causal else 1.0)
    return 2.0 * rows * tokens * config.depth * (inputs + scores + after_attention(config))


def after_attention(config: TransformerConfig) -> int:
    """Multiply-adds of one block for one token behind its attention: the output projection and the MLP."""
    mlp = (3 if config.gated else 2) * config.width * (config.mlp_dim or 4 * config.width)
    return config.width * config.size_of_head * config.heads + mlp


def step_flops(network: MultimodalModel, shape: Shape, vocab_size: int) -> float:
    """FLOPs of one training step on one batch."""
    stream, backbone = network.config.streams["image"], network.config.backbone
    vit: VitConfig = stream.encoder
    patches = vit.num_features(1)
    media = stream.connector.num_tokens(patches)
    tokens = media + shape.text_tokens
    encode = stack_flops(vit.stack(vit.depth), shape.samples, patches, causal=False)
    encode += 2.0 * shape.samples * patches * 3 * vit.patch_size**2 * vit.width
    connect = (
        2.0
        * shape.samples
        * sum(p.numel() for p in network.streams["image"].connector.parameters() if p.ndim == 2)
        * media
    )
    decode = stack_flops(backbone.transformer, shape.samples, tokens, causal=True)
    # The first text token has nothing that predicts it within the text; all others are targets. The last block goes on
    # with the tokens alone that predict one: what is not computed does not count.
    targets = shape.text_tokens - 1
    decode -= 2.0 * shape.samples * (tokens - targets) * after_attention(backbone.transformer)
    logits = 2.0 * shape.samples * targets * backbone.width * vocab_size
    return 3.0 * (encode + connect + decode + logits)


def make_batch(processor: Processor, network: MultimodalModel, shape: Shape, vocab_size: int, seed: int) -> Batch:
    """A packed batch of random pictures and tokens."""
    rng, examples = np.random.default_rng(seed), []
    stream = network.config.streams["image"]
    side, media = stream.encoder.image_size, stream.connector.num_tokens(stream.encoder.num_features(1))
    for index in range(shape.samples):
        ids = [processor.tokenizer.media_id] * media + rng.integers(8, vocab_size, shape.text_tokens).tolist()
        targets = [False] * (media + 1) + [True] * (shape.text_tokens - 1)
        plan = Plan(
            str(index), ids, targets, [Span("image", 0, 0, media)], {"image": [(None, (1,))]}, modalities=("image",)
        )
        pixels = rng.normal(size=(3, side, side)).astype(np.float32)
        examples.append(Example(plan, {"image": [ModelInput([pixels], (1,))]}))
    return processor.collate(examples, packed=True)


class Bench:
    """The model on its device, and one training step."""

    def __init__(self, shape: Shape, vocab_size: int | None, device: str, compiled: bool) -> None:
        recipe = load_recipe({"name": "mfu", "model": shape.model})
        tokenizer = shapes.tokenizer(512)
        self.shape, self.vocab_size = shape, vocab_size or tokenizer.size
        self.compute = ComputeConfig(device=device, dtype="bfloat16").resolve()
        self.compute.apply()
        torch.manual_seed(0)
        self.network = MultimodalModel(recipe.model, self.vocab_size).to(self.compute.device)
        processor = make_processor(recipe, tokenizer)
        made = [make_batch(processor, self.network, shape, self.vocab_size, seed) for seed in range(2)]
        self.batches = [to_device(batch, self.compute.device) for batch in made]
        self.flops = step_flops(self.network, shape, self.vocab_size)
        self.optimizer = AdamW(lr=1e-4).build(self.network)
        self.objective = NextToken()
        if compiled:
            for name in ("streams.image.encoder.trunk.transformer", "backbone.transformer"):
                for block in self.network.get_submodule(name).blocks:
                    block.compile()

    @property
    def num_parameters(self) -> int:
        """A tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def step(self, turn: int) -> None:
        """Forward, backward, clipping, AdamW."""
        batch = self.batches[turn % len(self.batches)]
        with self.compute.autocast():
            outputs = self.network(batch, ("sequence",))
        self.objective(outputs, batch).total.backward()
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def steps(self, count: int) -> harness.Timed:
        """So many steps; the work is their samples."""
        timed = harness.Timed(float(count * self.shape.samples))
        self._wait()
        timed.start()
        for turn in range(count):
            self.step(turn)
        self._wait()
        timed.stop()
        return timed

    def _wait(self) -> None:
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def run(options: harness.Options, device: str = "cuda", sizes: Sequence[int] = (32, 64, 128, 256)) -> harness.Result:
    """Measure, eager and compiled, at several batch sizes."""
    result, lines = harness.Result("mfu", "Model FLOPs utilisation of a vision-language model of nanoVLM's shape"), []
    best = 0.0
    for samples in (2,) if options.quick else sizes:
        for compiled in (False,) if options.quick else (False, True):
            bench = Bench(
                tiny(samples) if options.quick else nano_vlm(samples),
                None if options.quick else 49_152,
                device,
                compiled,
            )
            name = f"{samples} samples, {'compiled blocks' if compiled else 'eager'}"
            count = 2 if options.quick else max(4, 1024 // samples)
            case: dict[str, Callable[[], harness.Timed]] = {name: lambda bench=bench, count=count: bench.steps(count)}
            row = harness.interleave(case, options.repeat)[0]
            tflops = float(np.median(row.rates)) * bench.flops / samples / 1e12
            peak = peak_tflops(bench.compute.device)
            share = tflops / peak if peak else float("nan")
            best = max(best, share) if peak else best
            memory = torch.cuda.max_memory_allocated() / 1e9 if bench.compute.device.type == "cuda" else float("nan")
            spread = f"{min(row.rates):.0f} - {max(row.rates):.0f}"
            lines.append(
                [name, float(np.median(row.rates)), spread, tflops, f"{share:.1%}" if peak else "no known peak", memory]
            )
            parameters = bench.num_parameters
            del bench, case
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    columns = ["case", "samples/s", "range", "TFLOP/s", "MFU", "peak memory, GB"]
    result.add_table(f"{parameters / 1e6:.0f}M parameters, bfloat16 autocast, one device", columns, lines)
    if not options.quick:
        result.add_goal("MFU", 0.45, best, unit="")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = harness.parse_options(__doc__, argv, repeat=3)
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "none")
    if device != "cuda" and not (device == "cpu" and options.quick):
        print(
            f"found no CUDA device (torch {torch.__version__}); model FLOPs utilisation is measured on a GPU. "
            "To try the script out at tiny size: --quick --device cpu",
            file=sys.stderr,
        )
        return 2
    run(options, device).finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
