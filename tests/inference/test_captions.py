"""Captions by an encoder backbone: what is written is what the training pass predicts, whoever stands beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, build, decoder_data, joint_data, medium

from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Media, Text
from polymodal.core.passes import TokenPass
from polymodal.core.samples import Sample
from polymodal.inference.captions import write_captions
from polymodal.inference.engine import Engine
from polymodal.inference.sampling import Sampling
from polymodal.models.compose.joint import JointRun
from polymodal.models.compose.writing import WritingRun

GREEDY = Sampling(max_new_tokens=12)
CAPTION = TokenPass("caption", "words")


def make(*, watched: bool = True, reader: dict[str, Any] | None = None, seed: int = 3) -> tuple[Toy, Engine]:
    data = joint_data(cls=False)
    data["streams"]["text"]["reader"] = reader or {"use": "text", "max_tokens": 20, "add_special": True}
    data["streams"]["image"]["enters"] = "cross_attention" if watched else "sequence"
    toy = build(data, seed=seed)
    # Small random weights repeat one token; large ones write captions that depend on the whole picture.
    for parameter in toy.network.backbone.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return toy, Engine(toy.network, toy.processor)


def pictures(count: int) -> list[Media]:
    return [medium("image", index) for index in range(count)]


@pytest.mark.parametrize("watched", [True, False])
def test_each_token_is_what_the_training_pass_predicts(watched: bool) -> None:
    toy, engine = make(watched=watched)
    found = write_captions(engine, pictures(4), GREEDY)
    assert len({generation.text for generation in found}) > 1
    start, end = toy.tokenizer.bos_id, toy.tokenizer.eos_id
    for picture, written in zip(pictures(4), found, strict=True):
        batch = toy.batch([Sample("a", views={"image": picture, "text": Text("a")})])
        ids = [start, *written.ids, end]
        text = batch.streams["text"]
        text.values, text.lengths = torch.tensor([ids]), torch.tensor([len(ids)])
        predicted = toy.network(batch, (CAPTION,)).tokens[CAPTION].predictions.argmax(1).tolist()
        assert predicted[: len(written.ids)] == written.ids
        if written.finish == "stop":
            assert predicted[len(written.ids)] == end
        else:
            assert len(written.ids) == GREEDY.max_new_tokens


def test_a_caption_does_not_depend_on_what_stands_beside_it() -> None:
    _, engine = make()
    media = [*pictures(3), None, *pictures(2), None]
    together = write_captions(engine, media, GREEDY, batch_size=2)
    for medium_, written in zip(media, together, strict=True):
        assert write_captions(engine, [medium_], GREEDY)[0] == written
    assert together[0] == together[4]
    assert together[3] == together[6] != together[0]


def test_a_text_ends_where_positions_end_and_with_its_end_token() -> None:
    toy, engine = make(reader={"use": "text", "max_tokens": 5, "add_special": True})
    assert max(len(written.ids) for written in write_captions(engine, pictures(4), GREEDY)) <= 4
    with torch.no_grad():
        toy.network.head("masked_token").proj.bias[toy.tokenizer.eos_id] = 1e3
    assert [(w.ids, w.finish, w.text) for w in write_captions(engine, pictures(2), GREEDY)] == [([], "stop", "")] * 2


def test_draws_from_the_nucleus_repeat_with_their_seed() -> None:
    _, engine = make()
    drawn = [
        [w.text for w in write_captions(engine, pictures(4), Sampling(max_new_tokens=8, temperature=2.0, seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_models_that_cannot_write_say_what_they_lack() -> None:
    _, engine = make(reader={"use": "text", "max_tokens": 20})
    with pytest.raises(ConfigError, match=r"could neither begin nor end; train with reader: \{use: text, add_special"):
        write_captions(engine, pictures(1), GREEDY)
    toy = build(joint_data({"match": {"use": "matching"}}))
    with pytest.raises(ConfigError, match="found 0 masked_token heads that predict tokens, expected one"):
        write_captions(Engine(toy.network, toy.processor), pictures(1), GREEDY)
    toy = build(decoder_data())
    with pytest.raises(ConfigError, match="found the backbone 'decoder', expected 'encoder'"):
        write_captions(Engine(toy.network, toy.processor), pictures(1), GREEDY)
    _, engine = make()
    with pytest.raises(SampleError, match="this model takes"):
        write_captions(engine, [medium("audio", 0)], GREEDY)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("order", [("text", "image"), ("image", "text")])
def test_what_is_kept_changes_no_caption(
    order: tuple[str, str], watched: bool, cls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = joint_data(cls=cls, **({} if watched else {"order": list(order)}))
    data["streams"]["text"]["reader"] = {"use": "text", "max_tokens": 20, "add_special": True}
    data["streams"]["image"]["enters"] = "cross_attention" if watched else "sequence"
    toy = build(data, seed=3)
    for parameter in toy.network.backbone.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    engine = Engine(toy.network, toy.processor)
    media = [*pictures(4), None]
    lengths: list[int] = []
    hook = toy.network.backbone.transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    kept = write_captions(engine, media, GREEDY)
    steps, lengths[:] = list(lengths), []
    monkeypatch.setattr(type(toy.network.backbone), "can_write", False)
    assert write_captions(engine, media, GREEDY) == kept
    hook.remove()
    # One token a step after the first, instead of all.
    assert len(steps) == len(lengths) and sum(length > 1 for length in steps) <= 2 < sum(
        length > 1 for length in lengths
    )
    assert sum(steps) < sum(lengths) / 2


def test_pictures_of_several_sizes_are_captioned_without_keeping() -> None:
    data = joint_data(cls=False)
    data["streams"]["text"]["reader"] = {"use": "text", "max_tokens": 20, "add_special": True}
    toy = build(data, seed=3)
    batch = toy.batch([Sample(str(i), views={"image": picture}) for i, picture in enumerate(pictures(2))])
    run = JointRun(toy.network, batch, {"image": toy.network.encode("image", batch.streams["image"])})
    tokens, is_valid = run.lay_out(run.features)
    assert WritingRun(run, toy.network.head("masked_token"), tokens, is_valid, (2, 20)).cache is not None
    is_valid["image"][0, -1] = False
    assert WritingRun(run, toy.network.head("masked_token"), tokens, is_valid, (2, 20)).cache is None
