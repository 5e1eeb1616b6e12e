"""Media tokens dropped in the middle of the decoder: answers as by plain computation, cached or not, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Toy, build, decoder_data, question

from polymodal.core.errors import ConfigError
from polymodal.core.samples import Sample
from polymodal.inference.dropped import saved_share
from polymodal.inference.engine import Engine, Generation
from polymodal.inference.sampling import Sampling
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose import to_device
from polymodal.models.layers.dropping import MediaDrop
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.transformer import Transformer

STEPS = 8
GREEDY = Sampling(max_new_tokens=STEPS)
STACK = {"width": 24, "depth": 4, "heads": 4, "norm": "rms", "kv_heads": 2, "rope_theta": 10_000.0}


def make(**backbone: Any) -> tuple[Toy, Engine]:
    toy = build(decoder_data(tied=False, transformer=STACK, **backbone), seed=1)
    for parameter in toy.network.decoder.transformer.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    return toy, Engine(toy.network, toy.processor)


def questions() -> list[Sample]:
    return [
        question(0, "image", text="What is on the left of the large star?"),
        question(1, text="Is it red?"),
        question(2, "image", "image", "audio", text="Which?"),
        question(3, "video", "points", text="How do they move?"),
    ]


def part(stack: Transformer, first: int, end: int, *, last: bool) -> Transformer:
    """The blocks ``first .. end`` as a stack of their own."""
    made = Transformer(stack.config.model_copy(update={"depth": end - first, "final_norm": last}))
    for mine, theirs in zip(made.blocks, stack.blocks[first:end], strict=True):
        mine.load_state_dict(theirs.state_dict())
    if last:
        made.final_norm.load_state_dict(stack.final_norm.state_dict())
    return made


def attention(stack: Transformer, block: int, x_TD: Tensor) -> Tensor:
    """Causal attention of one block, averaged over the heads, ``[T, T]``: queries are rows."""
    own, tokens = stack.blocks[block].attention, len(x_TD)
    x_TD = stack.blocks[block].attention_norm(x_TD)
    q, k = (proj(x_TD).view(tokens, heads, 6) for proj, heads in ((own.q_proj, 4), (own.k_proj, 2)))
    angles = torch.arange(tokens)[:, None, None] * 10_000.0 ** (-torch.arange(0, 6, 2) / 6)

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., :3], x[..., 3:]
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

    scores = torch.einsum("qhk,thk->hqt", turned(q), turned(k).repeat_interleave(2, 1)) / 6**0.5
    scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1).mean(0)


@torch.no_grad()
def plainly(toy: Toy, sample: Sample, drop: MediaDrop) -> tuple[list[int], list[int]]:
    """Greedy ids and the places that are dropped: every step reads everything again, the later blocks what is kept."""
    plan = toy.processor.plan(sample, prompt=True)
    batch = to_device(toy.processor.collate([toy.processor.load(plan)], packed=False), "cpu")
    stack, x_TD = toy.network.decoder.transformer, toy.network.embed_sequence(batch)[0]
    front = part(stack, 0, drop.after, last=False)
    back = part(stack, drop.after, len(stack.blocks), last=True)
    before = part(stack, 0, drop.after - 1, last=False)(x_TD[None], Layout.padded(None, causal=True))[0]
    looks_TT = attention(stack, drop.after - 1, before)
    media = [place for span in plan.spans for place in range(span.start, span.start + span.length)]
    received = looks_TT[-1] if drop.by == "last" else looks_TT.mean(0)
    dropped = sorted(media, key=lambda place: float(received[place]))[: int(len(media) * drop.share)]
    kept = [place for place in range(len(x_TD)) if place not in dropped]
    ids: list[int] = []
    while len(ids) < STEPS:
        read_TD = front(x_TD[None], Layout.padded(None, causal=True))[0]
        rows = torch.tensor([*kept, *range(plan.num_tokens, len(x_TD))])
        states = back(read_TD[rows][None], Layout.padded(None, causal=True, positions_BT=rows[None]))
        ids.append(int(toy.network.token_logits(states[0, -1]).argmax()))
        x_TD = torch.cat((x_TD, toy.network.decoder.embed(torch.tensor([ids[-1:]]))[0]))
    return ids, dropped


@pytest.mark.parametrize("by", ["last", "mean"])
@pytest.mark.parametrize(("after", "share"), [(1, 0.5), (2, 0.7), (3, 0.3)])
def test_answers_are_those_of_reading_everything_anew(after: int, share: float, by: Any) -> None:
    toy, engine = make()
    drop = MediaDrop(after=after, share=share, by=by)
    expected = [plainly(toy, sample, drop)[0] for sample in questions()]
    for sample, ids in zip(questions(), expected, strict=True):
        assert list(engine.stream(sample, GREEDY, drop=drop)) == ids
    together = engine.generate(questions(), GREEDY, drop=drop)
    assert [generation.ids for generation in together] == expected, "rows lose different numbers of tokens"
    whole = [generation.ids for generation in engine.generate(questions(), GREEDY)]
    assert whole != expected, "the case shows a difference"
    assert whole[1] == expected[1], "no media, nothing dropped"


def test_nothing_dropped_is_the_same_to_the_bit() -> None:
    toy, engine = make()
    sample = questions()[2]
    batch = to_device(toy.processor.batch([sample, questions()[0]], prompt=True), "cpu")
    with torch.no_grad():
        plain = toy.network.states(batch)
        for share in (0.0, 0.01):
            assert torch.equal(toy.network.states(batch, drop=MediaDrop(after=2, share=share)), plain)
    none = Generation()
    list(engine.stream(sample, GREEDY, none, MediaDrop(after=2, share=0.0)))
    assert none.choices == [] and len(engine.prefixes) == 1, "prefixes are kept as ever"


def test_states_of_dropped_tokens_are_zero_and_all_others_are_there() -> None:
    toy, _ = make()
    sample, drop = question(2, "image", "image", "audio"), MediaDrop(after=2, share=0.5)
    batch = to_device(toy.processor.batch([sample, questions()[1]], prompt=True), "cpu")
    with torch.no_grad():
        states = toy.network.states(batch, drop=drop)
    zero = (states[0] == 0).all(-1).nonzero().squeeze(1).tolist()
    dropped = plainly(toy, sample, drop)[1]
    padding = (~batch.is_valid[0]).nonzero().squeeze(1).tolist()
    assert zero == sorted([*dropped, *padding])


def test_what_is_saved_is_said_and_prefixes_of_pruned_prompts_are_not_shared() -> None:
    _, engine = make()
    record = Generation()
    drop = MediaDrop(after=1, share=0.5)
    list(engine.stream(question(0, "image"), GREEDY, record, drop))
    assert len(engine.prefixes) == 0 and record.num_reused_tokens == 0
    assert record.choices == engine.generate([question(0, "image")], GREEDY, drop=drop)[0].choices
    assert record.choices[0].startswith("2 of 4 media tokens dropped after block 1 of 4: ")
    engine.drop = drop
    assert engine.generate([question(0, "image")], GREEDY)[0].choices == record.choices
    off = engine.generate([question(0, "image")], GREEDY, drop=MediaDrop(after=1, share=0.0))
    assert off[0].choices == []


def test_the_theoretical_saving_is_the_published_equation() -> None:
    config = DecoderConfig.parse({"transformer": {"width": 64, "depth": 32, "heads": 4, "mlp_dim": 100}})

    def cost(n: int) -> int:
        return 4 * n * 64**2 + 2 * n**2 * 64 + 2 * n * 64 * 100

    expected = 1 - (2 * cost(640) + 30 * cost(640 - 288)) / (32 * cost(640))
    assert saved_share(config, 640, 288, after=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        ({"depth": 2}, "found after: 2, expected less than the 2 blocks"),
        ({"window": 400}, "cross-attention or a window"),
    ],
)
def test_a_decoder_that_cannot_drop_says_so(transformer: dict[str, Any], message: str) -> None:
    toy = build(decoder_data(transformer={**STACK, **transformer}))
    with pytest.raises(ConfigError, match=message):
        Engine(toy.network, toy.processor).generate([question(0, "image")], GREEDY, drop=MediaDrop(after=2, share=0.5))


def test_media_are_encoded_once_although_no_prefix_is_kept() -> None:
    toy, engine = make()
    drop = MediaDrop(after=2, share=0.5)
    seen: list[int] = []
    toy.network.streams["image"].encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    asked = [question(2, "image", "audio", text=text) for text in ("Which?", "What is it?")]
    answers = [list(engine.stream(sample, GREEDY, None, drop)) for sample in asked]
    assert seen == [1] and not len(engine.prefixes)
    assert answers[1] == list(Engine(toy.network, toy.processor).stream(asked[1], GREEDY, None, drop))
