"""Media tokens dropped in the middle of the decoder: the time of a prefill, and the right answers of a trained run.

``--run FOLDER`` names the trained run (its recipe's first questions task is asked); without it only times are taken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

from benchmarks import harness
from benchmarks.generation import build, picture
from polymodal.core.samples import Sample, conversation
from polymodal.evaluation.tasks import QuestionsTask, limited, read_samples
from polymodal.inference.dropped import saved_share
from polymodal.inference.engine import Engine
from polymodal.inference.sampling import Sampling
from polymodal.models.layers.dropping import MediaDrop
from polymodal.recipes.evaluation import evaluate, own_tasks
from polymodal.recipes.model import Model
from polymodal.recipes.stored_models import load

PER_FAMILY = 60
"""Questions of each kind in every row."""
WHOLE = "all media tokens"


def named(drop: MediaDrop | None) -> str:
    """What a row is called."""
    return WHOLE if drop is None else f"{drop.share:.0%} dropped after block {drop.after} (by {drop.by})"


def prefill(options: harness.Options, result: harness.Result) -> None:
    """First tokens per second of a question about an image, without a prefix cache."""
    parts = build(options.quick)
    engine = Engine(parts.network.eval(), parts.processor, prefix_bytes=0)
    sample, one = conversation(picture(0, 64), "What is it?"), Sampling(max_new_tokens=1)
    plan = parts.processor.plan(sample, prompt=True)
    media = sum(span.length for span in plan.spans)
    backbone = parts.recipe.model.backbone
    drops = [None, *(MediaDrop(after=1 if options.quick else 2, share=share) for share in (0.5, 0.75))]

    def first(drop: MediaDrop | None) -> Callable[[], float]:
        return lambda: float(len(engine.generate([sample], one, drop=drop)))

    rows = harness.interleave({named(drop): first(drop) for drop in drops}, options.repeat)
    for row, drop in zip(rows, drops, strict=True):
        saved = 0.0 if drop is None else saved_share(backbone, plan.num_tokens, drop.count(media), drop.after)
        row.extra["saved by the equation"] = f"{saved:.1%}"
    title = (
        f"First token: prompt of {plan.num_tokens} tokens, {media} of them media, decoder of "
        f"{backbone.transformer.depth} blocks (encoding included)"
    )
    result.add_rows(title, rows, "first tokens/s", WHOLE)


def answers(run: str, result: harness.Result) -> None:
    """Right answers of a trained run, each row the same questions."""
    model = load(run)
    task = next(task for task in own_tasks(run) if isinstance(task, QuestionsTask))
    task = task.model_copy(update={"limit": PER_FAMILY, "conditions": ("full",)})
    depth = model.recipe.model.backbone.transformer.depth
    drops = [None] + [
        MediaDrop(after=after, share=share, by=by)
        for by in ("last", "mean")
        for after in (1, depth // 2)
        for share in (0.25, 0.5, 0.75)
    ]
    samples = [
        Sample(sample.id, sample.messages[:-1])
        for sample in limited(list(read_samples(task.data)), task.limit, task.seed)
    ]
    rows = []
    for drop in drops:
        model.engine.drop = drop
        score = evaluate(model, task).overall.score
        rows.append(
            [named(drop), f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", _saved(model, samples, drop)]
        )
    columns = ["decoder reads", "right answers", "95 % interval", "multiplications saved (median prompt)"]
    result.add_table(
        f"Right answers of {model.recipe.name}, {len(samples)} questions of {task.name or task.data}", columns, rows
    )


def _saved(model: Model, samples: Sequence[Sample], drop: MediaDrop | None) -> str:
    if drop is None:
        return "0.0%"
    plans = [model.engine.processor.plan(sample, prompt=True) for sample in samples]
    shares = [
        saved_share(
            model.recipe.model.backbone,
            plan.num_tokens,
            drop.count(sum(span.length for span in plan.spans)),
            drop.after,
        )
        for plan in plans
    ]
    return f"{statistics.median(shares):.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run")
    own, rest = parser.parse_known_args(argv)
    options = harness.parse_options(__doc__, rest, repeat=7)
    result = harness.Result("dropping", "Media tokens dropped in the middle of the decoder")
    prefill(options, result)
    if own.run is not None:
        answers(own.run, result)
        result.notes.append("Right answers: the same command with `--run runs/scenes-full`.")
    result.finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
