"""A budget of media tokens is kept whichever modalities are there, and what was chosen is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toys import ENCODERS, Toy, asked, build, decoder_data, medium, stream

from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.limits import Limits
from polymodal.core.parts import Image, Media, Video
from polymodal.core.samples import Sample, conversation
from polymodal.inference.engine import Engine, Generation
from polymodal.inference.prefix import identity
from polymodal.inference.sampling import Sampling
from polymodal.modalities.image import ImageReaderConfig
from polymodal.modalities.image.reader import ImageReader, most_varied
from polymodal.modalities.video import VideoReaderConfig
from polymodal.modalities.video.reader import VideoReader, most_changed


def toy(**processor: Any) -> Toy:
    """All media in a decoder; images in up to 6 tiles of 4 tokens, videos of up to 6 frames of 4 tokens."""
    data = decoder_data()
    tiles = {"use": "image", "size_px": 16, "resolution": "tiles", "max_tiles": 6}
    data["streams"]["image"] = stream("image", reader=tiles)
    frames = {**ENCODERS["video"], "features": "patch", "num_frames": 6}
    data["streams"]["video"] = stream("video", encoder=frames)
    return build(data, **processor)


def picture(width: int, height: int, seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(frames: int = 6, seed: int = 0) -> Video:
    return Video(np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8), fps=2.0)


def asking(*parts: Media, tokens: int | None = None) -> Sample:
    turn = conversation(*parts, "What is it?", answer="A red cube.")
    return Sample(turn.id, turn.messages, tokens=tokens)


MEDIA: dict[str, list[Media]] = {
    "one image": [picture(48, 32)],
    "a strip": [picture(96, 16)],
    "several images": [picture(48, 32), picture(16, 16, 1), picture(32, 48, 2)],
    "a video": [clip()],
    "two videos": [clip(), clip(3, 1)],
    "sound": [medium("audio", length=9)],
    "mixed": [picture(48, 32), clip(), medium("audio", length=9), medium("points"), medium("sensor", length=4)],
}


@pytest.fixture(scope="module")
def model() -> Toy:
    return toy()


@pytest.mark.parametrize("name", MEDIA)
def test_the_sum_of_all_media_never_passes_the_budget(name: str, model: Toy) -> None:
    media = MEDIA[name]
    whole = model.processor.plan(asking(*media))
    wanted = sum(span.length for span in whole.spans)
    assert whole.choices == [] and wanted > 4
    for budget in range(len(media), wanted + 2):
        plan = model.processor.plan(asking(*media, tokens=budget))
        found = sum(span.length for span in plan.spans)
        assert found <= budget
        assert (plan.choices == []) == (budget >= wanted)
        # What is kept is a good part of what is allowed: steps of pooling and of tiles cost less than half.
        assert found * 2 >= min(budget, wanted) - len(media)
        if budget in (len(media), wanted // 2, wanted - 1):
            with torch.no_grad():  # as many tokens as placeholders, or this is an error
                assert model.network(model.batch([asking(*media, tokens=budget)])).token_logits.isfinite().all()


def test_small_items_stay_whole_and_the_others_share(model: Toy) -> None:
    small, large, larger = picture(16, 16), picture(48, 32, 1), picture(32, 48, 2)
    plan = model.processor.plan(asking(small, large, larger, tokens=20))
    # Equal shares are 8 each, of which both could use 6 (three tiles by two); the rest goes to the first of them.
    assert [span.length for span in plan.spans] == [4, 10, 6]
    assert plan.choices == [
        "<image ndarray> (image): 5 of 7 tiles, every 2 tokens pooled, 10 of 28 tokens",
        "<image ndarray> (image): 3 of 7 tiles, every 2 tokens pooled, 6 of 28 tokens",
    ]


def test_frames_and_detail_are_lost_alike(model: Toy) -> None:
    plan = model.processor.plan(asking(clip(), tokens=6))
    assert [span.length for span in plan.spans] == [6]
    assert plan.choices == ["<video ndarray> (video): 3 of 6 frames, every 2 tokens pooled, 6 of 24 tokens"]
    read = model.processor.load(plan).inputs["video"][0]
    assert read is not None and read.lengths == (3,)


def test_pooled_tokens_are_means_of_neighbours(model: Toy) -> None:
    sample = asking(medium("audio", length=9))
    whole = model.processor.plan(sample)
    count = whole.spans[0].length
    with torch.no_grad():
        full = model.network.embed_sequence(model.batch([sample]))[0, whole.spans[0].start :][:count]
        budget = (count + 1) // 2
        batch = model.batch([asking(medium("audio", length=9), tokens=budget)])
        half = model.network.embed_sequence(batch)[0, whole.spans[0].start :][:budget]
    expected = torch.stack([full[2 * i : 2 * i + 2].mean(0) for i in range(budget)])
    torch.testing.assert_close(half, expected)


def test_a_stream_and_a_recipe_have_budgets_too() -> None:
    one = build(decoder_data(), tokens=6)
    one.processor.streams["audio"] = replace(one.processor.streams["audio"], tokens=3)
    sounds = [medium("audio", seed=seed, length=9) for seed in (0, 1)]
    plan = one.processor.plan(asking(*sounds, medium("image")))
    assert sum(span.length for span in plan.spans if span.stream == "audio") <= 3
    assert sum(span.length for span in plan.spans) <= 6
    more = one.processor.plan(asking(*sounds, medium("image"), tokens=40))
    assert sum(span.length for span in more.spans if span.stream == "audio") <= 3
    with pytest.raises(ConfigError, match="'tokens' is a budget of a sequence; found a stream that does not enter"):
        build({"streams": {"image": stream("image", enters="none", tokens=4)}, "backbone": "none", "heads": {}})


def test_what_cannot_be_kept_is_refused(model: Toy) -> None:
    with pytest.raises(
        SampleError, match=r"budget of 2 for 3 media items \(all media\), expected at least 3: one token"
    ):
        model.processor.plan(asking(clip(), picture(16, 16), medium("points"), tokens=2))


def test_packed_and_neighbours_change_nothing(model: Toy) -> None:
    samples = [asking(*MEDIA["mixed"], tokens=13), asking(clip(), tokens=5), asked(2, "image", "sensor")]
    with torch.no_grad():
        packed = model.network(model.batch(samples, packed=True))
        padded = model.network(model.batch(samples))
        for row, sample in enumerate(samples):
            alone = model.network(model.batch([sample])).token_logits
            for outputs in (packed, padded):
                torch.testing.assert_close(
                    outputs.token_logits[outputs.token_samples == row], alone, rtol=1e-4, atol=1e-5
                )


def test_a_prompt_with_another_budget_is_another_prompt(model: Toy) -> None:
    turn = conversation(clip(), "What?")
    plans = [
        model.processor.plan(Sample("q", turn.messages, tokens=tokens), prompt=True) for tokens in (None, 12, 6, 6)
    ]
    keys = [identity(plan) for plan in plans]
    assert len(set(keys)) == 3 and keys[2] == keys[3]
    engine = Engine(model.network, model.processor)
    first = [_answer(engine, Sample("q", turn.messages, tokens=tokens)) for tokens in (None, 12, 6)]
    again = [_answer(engine, Sample("q", turn.messages, tokens=tokens)) for tokens in (6, 12, None)]
    fresh = [
        _answer(Engine(model.network, model.processor), Sample("q", turn.messages, tokens=tokens))
        for tokens in (None, 12, 6)
    ]
    assert [ids for ids, _ in first] == [ids for ids, _ in fresh] == [ids for ids, _ in again[::-1]]
    assert [len(choices) for _, choices in first] == [0, 1, 1]


def _answer(engine: Engine, sample: Sample) -> tuple[list[int], list[str]]:
    record = Generation()
    return list(engine.stream(sample, Sampling(max_new_tokens=4), record)), record.choices


def test_frames_that_change_are_taken() -> None:
    values = [0, 0, 0, 0, 90, 90, 90, 90, 90, 90, 200, 200, 200, 200, 200, 10]
    video = Video(np.stack([np.full((16, 16, 3), value, np.uint8) for value in values]), fps=2.0)
    reader = VideoReader(VideoReaderConfig(size_px=16, sampling="change", num_frames=4), Limits())
    assert reader.measure(video) == (4,)
    unit = reader.read(video).units[0]
    assert [round((float(frame.mean()) * 0.5 + 0.5) * 255) for frame in unit] == [0, 90, 200, 10]
    assert most_changed(np.zeros((2, 3, 1, 1), np.float32), 5).tolist() == [0, 1]
    short = Video(np.zeros((3, 16, 16, 3), np.uint8), fps=2.0)
    assert reader.measure(short) == (3,) and len(reader.read(short).units[0]) == 3


@pytest.fixture(scope="module")
def by_content() -> Toy:
    data = decoder_data()
    reader = {"use": "image", "size_px": 16, "resolution": "tiles", "max_tiles": 6, "tiles_by": "content"}
    data["streams"]["image"] = stream("image", reader=reader)
    return build(data)


def test_plain_tiles_go_first_and_the_budget_is_kept(by_content: Toy) -> None:
    pixels = np.full((32, 48, 3), 90, np.uint8)
    rng = np.random.default_rng(0)
    pixels[:16, 32:] = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[16:, :16] = rng.integers(60, 120, (16, 16, 3), dtype=np.uint8)
    whole = by_content.processor.load(by_content.processor.plan(asking(Image(pixels)))).inputs["image"][0]
    assert len(whole.units) == 7 and whole.grid == (2, 3)
    plan = by_content.processor.plan(asking(Image(pixels), tokens=12))
    assert plan.choices == ["<image ndarray> (image): 6 of 7 tiles, every 2 tokens pooled, 12 of 28 tokens"]
    assert sum(span.length for span in plan.spans) == 12
    kept = by_content.processor.load(plan).inputs["image"][0]
    assert kept.grid == (1, 5) and kept.lengths == (1,) * 6
    for mine, place in zip(kept.units, range(6), strict=True):
        assert np.array_equal(mine, whole.units[place]), "of equally plain tiles the last one went"
    again = by_content.processor.load(by_content.processor.plan(asking(Image(pixels), tokens=12))).inputs["image"][0]
    assert all(np.array_equal(a, b) for a, b in zip(kept.units, again.units, strict=True))
    config = ImageReaderConfig.parse({"size_px": 16, "resolution": "tiles", "max_tiles": 6, "keep_tiles": 2})
    reader = ImageReader(config, Limits())
    few = reader.read(Image(pixels))
    assert few.lengths == reader.measure(Image(pixels)) == (1, 1, 1)
    for mine, place in zip(few.units, (0, 3, 4), strict=True):
        assert np.array_equal(mine, whole.units[place]), "the thumbnail, and the two tiles with something on them"


@pytest.mark.parametrize("tokens", range(1, 29, 3))
def test_any_budget_is_kept_by_content_as_well(by_content: Toy, tokens: int) -> None:
    sample = asking(picture(48, 32), tokens=tokens)
    batch = by_content.batch([sample])
    entry = batch.streams["image"]
    assert sum(entry.token_counts) <= tokens
    by_content.network(batch)


def test_equal_tiles_keep_the_first_and_other_resolutions_have_none() -> None:
    plain, noise = np.zeros((3, 4, 4), np.float32), np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    assert most_varied([plain, noise, plain, noise, plain], 3) == [0, 1, 3]
    with pytest.raises(ConfigError, match="keep_tiles and tiles_by belong to resolution: tiles; found anyres"):
        ImageReaderConfig.parse({"resolution": "anyres", "tiles_by": "content"})
