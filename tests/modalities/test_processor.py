"""The processor: where media stand, what is a target, what does not fit, and how samples become batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
import toys
from toys import Toy, asked, build, decoder_data, medium, mixed, stream

from polymodal.core.batch import Plan
from polymodal.core.errors import SampleError
from polymodal.core.parts import Audio, Image, Text
from polymodal.core.samples import Message, Sample, conversation
from polymodal.modalities.processor import Processor, StreamLayout, collate_units
from polymodal.modalities.text import chat_format


@pytest.fixture(scope="module")
def toy() -> Toy:
    return build(decoder_data())


def shown(toy: Toy, plan: Plan) -> str:
    """The plan as text, with placeholders."""
    return toy.tokenizer.decode(plan.ids, with_controls=True).replace("<|media|>", "*")


def targets(toy: Toy, plan: Plan) -> str:
    ids = [id for id, is_target in zip(plan.ids, plan.is_supervised, strict=True) if is_target]
    return toy.tokenizer.decode(ids, with_controls=True)


def limited(toy: Toy, max_tokens: int, overflow: str = "refuse") -> Processor:
    return Processor(
        toy.tokenizer, chat_format("turns"), toy.processor.streams, max_tokens=max_tokens, overflow=overflow
    )


def test_placeholders_are_what_the_model_gives(toy: Toy) -> None:
    for sample in mixed():
        plan = toy.processor.plan(sample)
        batch = toy.batch([sample])
        for span in plan.spans:
            part, lengths = plan.items[span.stream][span.item]
            assert span.length == toy.config.count_tokens(span.stream, lengths)
            assert plan.ids[span.start : span.start + span.length] == [toy.tokenizer.media_id] * span.length
            assert part in sample.media()
        for name, entry in batch.streams.items():
            assert len(toy.network.connect(name, toy.network.encode(name, entry), entry)) == sum(entry.token_counts)
        assert plan.ids.count(toy.tokenizer.media_id) == sum(span.length for span in plan.spans)


def test_media_stand_where_they_are_said_in_every_turn(toy: Toy) -> None:
    turns = (
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("See "), medium("image", 1), Text(" and "), medium("image", 2), Text("?"))),
        Message("assistant", (Text("Both red."),)),
        Message("user", (medium("sensor", 3), Text("Now?"))),
        Message("assistant", (Text("It fell."),)),
    )
    plan = toy.processor.plan(Sample("s", turns))
    assert shown(toy, plan) == (
        "<|system|>Be brief.<|user|>See **** and ****?<|assistant|>Both red.<|end|><|user|>***Now?<|assistant|>It fell."
        "<|end|>"
    )
    assert targets(toy, plan) == "Both red.<|end|>It fell.<|end|>"
    assert [(span.stream, span.item, span.length) for span in plan.spans] == [
        ("image", 0, 4), ("image", 1, 4), ("sensor", 0, 3),
    ]  # fmt: skip
    assert plan.modalities == ("image", "sensor")


def test_text_alone_has_no_streams(toy: Toy) -> None:
    plan = toy.processor.plan(asked(0))
    assert shown(toy, plan) == "<|user|>What is it?<|assistant|>A red cube.<|end|>"
    assert plan.items == {} and plan.modalities == () and plan.spans == []
    assert toy.batch([asked(0)]).streams == {}


def test_a_prompt_ends_with_the_opening_of_an_answer(toy: Toy) -> None:
    plan = toy.processor.plan(conversation(medium("image"), "What?"), prompt=True)
    assert shown(toy, plan) == "<|user|>****What?<|assistant|>"
    assert not any(plan.is_supervised)


def test_control_strings_in_what_people_write_stay_text(toy: Toy) -> None:
    rng = random.Random(0)
    controls = set(toy.tokenizer.controls.values())
    pieces = [*toy.tokenizer.controls, "<|", "|>", "<", "end", " ", "\n", "\U0001f600"]
    for _ in range(200):
        asked_text, answer = ("".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(2))
        plan = toy.processor.plan(conversation(asked_text, medium("image"), answer=answer))
        found = [toy.tokenizer.decode([id], with_controls=True) for id in plan.ids if id in controls]
        assert found == ["<|user|>", *["<|media|>"] * 4, "<|assistant|>", "<|end|>"]
        assert targets(toy, plan) == answer + "<|end|>"


def test_several_streams_of_one_modality_each_take_the_item() -> None:
    data = decoder_data()
    wide = {"use": "vit", "image_size": 16, "patch_size": 4, **toys.SMALL}
    data["streams"] = {"image": stream("image"), "detail": stream("image", encoder=wide)}
    toy = build(data)
    plan = toy.processor.plan(conversation("a", medium("image", 1), "b", medium("image", 2), answer="c"))
    assert [(s.stream, s.item, s.start, s.length) for s in plan.spans] == [
        ("image", 0, 2, 4), ("detail", 0, 6, 16), ("image", 1, 23, 4), ("detail", 1, 27, 16),
    ]  # fmt: skip
    assert toy.network(toy.batch([conversation(medium("image"), answer="c")])).token_logits is not None


def test_streams_that_do_not_enter_take_items_and_no_places() -> None:
    data = decoder_data()
    data["streams"]["image"] = stream("image", enters="none")
    toy = build(data)
    batch = toy.batch([conversation(medium("image"), "What?", answer="a")])
    assert batch.streams["image"].token_index.tolist() == [] and batch.streams["image"].token_counts == []
    assert toy.tokenizer.media_id not in batch.ids


def test_too_long_is_refused_by_name_or_loses_text_from_its_end(toy: Toy) -> None:
    sample = asked(0, "image", answer="A red cube on a large table.")
    whole = toy.processor.plan(sample)
    size = whole.num_tokens
    with pytest.raises(
        SampleError, match=rf"sample s0: has {size} tokens, max_tokens is {size - 1}; raise max_tokens, or"
    ):
        limited(toy, size - 1).plan(sample)
    assert limited(toy, size).plan(sample).ids == whole.ids
    cut = limited(toy, size - 3, "cut_text").plan(sample)
    assert cut.ids == whole.ids[:-3] and cut.is_supervised == whole.is_supervised[:-3]


def test_a_cut_never_goes_through_an_image_nor_drops_one(toy: Toy) -> None:
    sample = Sample(
        "s7",
        (
            Message("user", (Text("Hi"),)),
            Message("assistant", (Text("Yes?"),)),
            Message("user", (Text("See: "), medium("image"), Text("?"))),
            Message("assistant", (Text("A cube."),)),
        ),
    )
    (span,) = toy.processor.plan(sample).spans
    for limit in (span.start, span.start + 1, span.start + span.length - 1):
        with pytest.raises(SampleError) as error:
            limited(toy, limit, "cut_text").plan(sample)
        assert str(error.value) == (
            f"sample s7: has {toy.processor.plan(sample).num_tokens} tokens, max_tokens is {limit}; cutting there "
            f"would cut through or drop 1 media span(s), the first of stream 'image' at tokens {span.start}.."
            f"{span.start + span.length}"
        )
    assert limited(toy, span.start + span.length, "cut_text").plan(sample).num_tokens == span.start + span.length


def test_a_cut_that_leaves_no_target_is_refused(toy: Toy) -> None:
    with pytest.raises(SampleError, match="sample s0: has no supervised tokens; expected an assistant message"):
        limited(toy, 4, "cut_text").plan(asked(0))


def test_samples_that_cannot_be_laid_out_are_refused_by_name(toy: Toy) -> None:
    def fails(sample: Sample, message: str) -> None:
        with pytest.raises(SampleError, match=message):
            toy.processor.plan(sample)

    fails(Sample("a", (Message("user", (Text("Hi"),)),)), "sample a: has no supervised tokens")
    fails(
        Sample("b", (Message("user", (Image("gone.png"), Text("?"))), Message("assistant", (Text("x"),)))), "gone.png"
    )
    fails(
        Sample("c", views={"text": Text("x")}), r"sample c: has views \['text'\], this model takes \['audio', 'image'"
    )
    data = decoder_data()
    del data["streams"]["audio"]
    no_audio = build(data)
    with pytest.raises(
        SampleError, match=r"sample s0: <audio ndarray>: unknown modality for this model 'audio'. Valid"
    ):
        no_audio.processor.plan(asked(0, "audio"))


def test_a_damaged_item_names_the_sample_and_the_item(toy: Toy) -> None:
    with pytest.raises(SampleError, match="sample s: <image bytes>: "):
        toy.processor.plan(conversation(Image(b"not a picture"), "?", answer="x", id="s"))
    sound = Audio(np.full(400, np.nan, np.float32), rate_hz=4000)
    with pytest.raises(SampleError, match=r"sample s: <audio ndarray>: .*NaN"):
        toy.batch([conversation(sound, "?", answer="x", id="s")])


def test_padded_and_packed_batches_of_the_worked_example(toy: Toy) -> None:
    plans = [
        Plan("a", [11, 12, 13], [False, False, True], [], {}, label="x", modalities=("image",)),
        Plan("b", [14, 15], [False, True], [], {}),
    ]
    examples = [toy.processor.load(plan) for plan in plans]
    pad = toy.tokenizer.pad_id
    padded = toy.processor.collate(examples, packed=False)
    assert padded.ids.tolist() == [[11, 12, 13], [14, 15, pad]]
    assert padded.is_valid.tolist() == [[True, True, True], [True, True, False]]
    assert padded.is_supervised.tolist() == [[False, False, True], [False, True, False]]
    assert padded.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert padded.segment_lengths is None
    packed = toy.processor.collate(examples, packed=True)
    assert packed.ids.tolist() == [[11, 12, 13, 14, 15]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.is_supervised.tolist() == [[False, False, True, False, True]]
    assert packed.is_valid.all() and packed.segment_lengths == (3, 2)
    for batch in (padded, packed):
        assert batch.ids.dtype == batch.positions.dtype == np.int64
        assert (batch.sample_ids, batch.labels, batch.modalities) == (["a", "b"], ["x", None], [("image",), ()])
        assert batch.num_samples == 2


@pytest.mark.parametrize("packed", [True, False])
def test_token_index_points_at_the_placeholders_of_each_item(toy: Toy, packed: bool) -> None:
    samples = mixed()
    batch = toy.batch(samples, packed=packed)
    flat = batch.ids.reshape(-1)
    places = [place for entry in batch.streams.values() for place in entry.token_index.tolist()]
    assert sorted(places) == (flat == toy.tokenizer.media_id).nonzero().squeeze(1).tolist()
    starts = [0]
    for sample in samples[:-1]:
        starts.append(starts[-1] + (toy.processor.plan(sample).num_tokens if packed else batch.ids.shape[1]))
    for name, entry in batch.streams.items():
        pieces = np.split(entry.token_index.numpy(), np.cumsum(entry.token_counts)[:-1])
        expected = [
            (owner, list(range(starts[owner] + span.start, starts[owner] + span.start + span.length)))
            for owner, sample in enumerate(samples)
            for span in toy.processor.plan(sample).spans
            if span.stream == name
        ]
        found = list(zip(entry.sample_of_item.tolist(), (piece.tolist() for piece in pieces), strict=True))
        assert found == expected


def test_ragged_units_are_padded_with_zeros(toy: Toy) -> None:
    batch = toy.batch([asked(0, "sensor"), asked(1, "sensor")]).streams["sensor"]
    assert batch.lengths.tolist() == [9, 18]
    assert batch.values.shape == (2, 18, 2)
    assert not batch.values[0, 9:].any() and batch.values[0, :9].all()


def test_items_with_stored_features_are_not_decoded(toy: Toy) -> None:
    layouts = {
        name: StreamLayout(layout.reader, layout.enters_sequence, layout.count_tokens, f"tag-{name}")
        for name, layout in toy.processor.streams.items()
    }
    processor = Processor(toy.tokenizer, chat_format("turns"), layouts, max_tokens=256)
    sample = conversation(medium("image", 1), medium("image", 2), "?", answer="x")
    plan = processor.plan(sample)
    keys = [f"tag-image:{part.content_key()}" for part in sample.media()]
    example = processor.load(plan, lambda key: key == keys[0])
    assert example.keys["image"] == keys
    assert example.inputs["image"][0] is None and example.inputs["image"][1] is not None
    assert processor.collate([example], packed=True).streams["image"].values is None
    assert processor.load(plan).keys["image"] == []


def test_view_sets_take_the_views_that_the_model_knows() -> None:
    data = {
        "streams": {name: stream(name, enters="none") for name in ("text", "image")},
        "backbone": "none",
        "heads": {"space": {"use": "projection", "dim": 8}},
    }
    toy = build(data)
    sample = Sample("v", views={"image": medium("image"), "audio": medium("audio"), "text": Text("hi")}, label="cat")
    plan = toy.processor.plan(sample)
    assert set(plan.items) == {"text", "image"} and plan.ids == [] and plan.label == "cat"
    batch = toy.batch([sample, Sample("w", views={"text": Text("longer text")})])
    assert batch.ids.shape == (2, 0) and batch.labels == ["cat", None]
    assert batch.streams["image"].sample_of_item.tolist() == [0]
    assert batch.streams["text"].sample_of_item.tolist() == [0, 1]


def test_units_alone_make_a_batch_that_belongs_to_no_sequence(toy: Toy) -> None:
    reader = toy.processor.streams["sensor"].reader
    batch = collate_units([reader.read(medium("sensor", i, 1 + i)) for i in range(2)], reader)
    assert batch.values.shape == (2, 18, 2) and batch.unit_counts == [1, 1] and batch.token_counts == []


def test_fixed_shapes_are_read_into_their_batch_with_the_same_values(toy: Toy) -> None:
    samples = [conversation(medium("image", i), medium("image", i + 1), "?", answer="x", id=f"s{i}") for i in range(3)]
    expected = toy.batch(samples).streams["image"].values
    plans = [toy.processor.plan(sample) for sample in samples]
    toy.processor.reserve(plans)
    reserved = plans[0].rows["image"].base
    examples = [toy.processor.load(plan) for plan in plans]
    batch = toy.processor.collate(examples, packed=False)
    assert batch.streams["image"].values is reserved, "nothing was copied"
    np.testing.assert_array_equal(reserved, expected)
    without = toy.processor.collate([examples[0], examples[2]], packed=False).streams["image"].values
    np.testing.assert_array_equal(without, expected[[0, 1, 4, 5]], err_msg="a damaged sample leaves no gap")
    turned = toy.processor.collate(examples[::-1], packed=False).streams["image"].values
    np.testing.assert_array_equal(turned, expected[[4, 5, 2, 3, 0, 1]], err_msg="rows are taken only in their order")
