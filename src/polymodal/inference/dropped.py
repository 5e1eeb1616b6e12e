"""What dropping media tokens in the middle of a decoder saves, known from the plan of a prompt."""

from __future__ import annotations

from polymodal.core.batch import Plan
from polymodal.models.backbones.decoder import CausalConfig, DecoderConfig
from polymodal.models.layers.dropping import MediaDrop, prefill_cost


def saved_share(config: DecoderConfig, tokens: int, dropped: int, after: int) -> float:
    """The share of a prefill's multiplications that dropping saves, between 0 and 1.

    Source: FastV, arXiv 2403.06764, section 4.1 and its equation of the theoretical reduction.

    Args:
        config: of the decoder.
        tokens: of the prompt.
        dropped: of them.
        after: blocks that read all of them.
    """
    stack = config.transformer.resolved()
    inner, outer = stack.heads * stack.size_of_head, stack.num_kv_heads * stack.size_of_head
    mlp = (stack.mlp_dim or 0) * (3 if stack.gated else 2)
    whole, rest = (prefill_cost(count, stack.width, inner, outer, mlp) for count in (tokens, tokens - dropped))
    return (stack.depth - after) / stack.depth * (1 - rest / whole)


def dropped_words(plan: Plan, config: CausalConfig, drop: MediaDrop | None) -> list[str]:
    """What is dropped of a prompt, in words; none where nothing is."""
    if drop is None or not isinstance(config, DecoderConfig):
        return []
    media = sum(span.length for span in plan.spans)
    dropped = drop.count(media)
    if not dropped:
        return []
    saved = saved_share(config, plan.num_tokens, dropped, drop.after)
    return [
        f"{dropped} of {media} media tokens dropped after block {drop.after} of {config.transformer.depth}: "
        f"{saved:.1%} fewer multiplications in the decoder's reading of the prompt"
    ]
