import io
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from polymodal.core.errors import DataError
from polymodal.core.samples import sample_from_json
from polymodal.data.scenes import FAMILIES, HELD_OUT, make_scene, make_scenes, questions, scene_samples, text_samples
from polymodal.data.scenes.captions import MEDIA, facts
from polymodal.data.scenes.details import details
from polymodal.data.scenes.gif import encode_gif
from polymodal.data.scenes.latent import COLOURS, DIRECTIONS, MOTIONS, SHAPES, SOLIDS, SOUNDS, alone, paired, stratum
from polymodal.data.scenes.layout import AREAS_PX, NUM_FRAMES, SIDE_PX, STEP_PX, STEPS, holds, radius_px
from polymodal.data.scenes.motion import CHANNELS, recording, recording_csv
from polymodal.data.scenes.picture import picture, picture_png, video_gif, video_indices
from polymodal.data.scenes.solid import SCALES, cloud, cloud_ply
from polymodal.data.scenes.sound import RATE_HZ, sound, sound_wav

ALL = tuple(FAMILIES)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(0, "train", i) for i in range(1500)]


@pytest.fixture(scope="module")
def asked(scenes):
    """Per family: (question text, answer) of every scene."""
    result = defaultdict(list)
    for scene in scenes:
        for question in questions(scene, ALL, scene.words()):
            result[question.family].append((question.text, question.answer))
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    return out, make_scenes(out, 12, 5, 5, seed=3)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the latent scene


def test_a_scene_depends_on_seed_split_and_index_alone():
    assert make_scene(1, "train", 7) == make_scene(1, "train", 7)
    others = [make_scene(2, "train", 7), make_scene(1, "val", 7), make_scene(1, "train", 8)]
    assert all(facts(other, "image") != facts(make_scene(1, "train", 7), "image") for other in others)


def test_bad_scene_arguments_are_named():
    with pytest.raises(DataError, match=r"stream 'test'.*expected .*train, val, novel"):
        make_scene(0, "test", 0)
    with pytest.raises(DataError, match=r"index -1"):
        make_scene(0, "train", -1)


def test_every_block_of_a_stratum_holds_every_value_once():
    for size in (2, 4, 25):
        values = [stratum(5, "val", i, "x", size) for i in range(8 * size)]
        for start in range(0, len(values), size):
            assert sorted(values[start : start + size]) == list(range(size))


def test_shapes_are_unique_and_things_keep_apart_and_inside(scenes):
    for scene in scenes[:400]:
        shapes = [thing.shape for thing in scene.things]
        assert len(set(shapes)) == len(shapes) in (1, 2, 3, 4)
        for f in (None, 0, 3, NUM_FRAMES - 1):
            spots = []
            for thing, move in zip(scene.things, scene.moves, strict=True):
                start, step = (thing.xy, (0, 0)) if f is None else (thing.video_xy, STEPS[move])
                xy = np.array(start) + np.array(step) * STEP_PX * (f or 0)
                radius = radius_px(thing.shape, thing.size)
                assert np.all(xy >= radius) and np.all(xy <= SIDE_PX - radius)
                assert all(np.hypot(*(xy - other)) > radius + r for other, r in spots)
                spots.append((xy, radius))


def test_relations_hold_and_compared_things_differ_in_size(scenes):
    for scene in scenes[:400]:
        if len(scene.things) == 1:
            assert scene.relation is None and scene.compared is None
            continue
        first, second, where = scene.relation
        assert holds(scene.things[first].xy, scene.things[second].xy, where)
        assert {scene.things[i].size for i in scene.compared} == {"small", "large"}


def test_two_things_move_in_different_directions_and_two_blink(scenes):
    for scene in scenes:
        moves = [move for move in scene.moves if move]
        assert len(moves) == len(set(moves)) == min(2, len(scene.things)) == len(set(scene.blinks))


def test_what_sounds_blinks_and_compares_does_not_tell_the_first_thing_apart(scenes):
    """Were the sounding thing marked in the picture or video, the cross-modal questions would need no sound."""
    three = [scene for scene in scenes if len(scene.things) == 3]
    blink = np.mean([0 in scene.blinks for scene in three])
    large = [np.mean([scene.things[i].size == "large" for scene in three]) for i in range(3)]
    related = np.mean([0 in scene.relation[:2] for scene in three])
    assert abs(blink - 2 / 3) < 0.07 and abs(related - 2 / 3) < 0.07
    assert max(large) - min(large) < 0.1
    x = [np.mean([scene.things[i].xy[0] for scene in three]) for i in range(3)]
    assert max(x) - min(x) < 4


# -- held-out pairs


def test_held_out_pairs_leave_every_colour_and_shape_in_train(scenes):
    pairs = {(t.colour, t.shape) for scene in scenes for t in scene.things}
    assert not pairs & set(HELD_OUT)
    assert len(pairs) == len(SHAPES) * len(COLOURS) - len(HELD_OUT)
    assert {c for c, _ in pairs} == set(COLOURS) and {s for _, s in pairs} == set(SHAPES)


def test_train_and_val_never_name_a_held_out_pair():
    for stream in ("train", "val"):
        for i in range(150):
            scene, other = make_scene(0, stream, i), make_scene(0, f"{stream}-text", i)
            told = json.dumps(
                [str(s.messages) + str(s.views) for _, s in (*scene_samples(scene), *text_samples(other))]
            )
            assert not any(f"{colour} {shape}" in told for colour, shape in HELD_OUT)


def test_novel_scenes_hold_one_pair_and_ask_about_it():
    positives = Counter()
    for i in range(100):
        scene = make_scene(0, "novel", i)
        assert [(t.colour, t.shape) in HELD_OUT for t in scene.things] == [True] + [False] * (len(scene.things) - 1)
        thing = scene.things[0]
        for question in questions(scene, ALL, scene.words()):
            if question.family in ("attribute", "existence", "spatial", "comparison", "direction", "order"):
                assert thing.shape in question.text or thing.colour in question.text
            if question.family == "existence":
                positives[question.answer] += 1
        assert scene.counted_colour in (None, thing.colour)
    assert positives == {"yes": 50, "no": 50}


# -- questions


def test_answers_are_balanced(asked, scenes):
    for family in ("sound", "sound_count", "direction", "solid", "solid_size", "motion", "existence"):
        counts = Counter(answer for _, answer in asked[family])
        assert set(counts) == set(FAMILIES[family].answers)
        assert max(counts.values()) - min(counts.values()) <= 1 and sum(counts.values()) == len(scenes)
    for family in ("spatial", "sound_direction"):
        counts = Counter(answer for _, answer in asked[family])
        assert max(counts.values()) < 1.15 * sum(counts.values()) / 4
    counts = Counter(
        answer for text, answer in asked["count"] if text in ("Count the objects.", "How many objects are there?")
    )
    assert max(counts.values()) < 1.25 * sum(counts.values()) / 4


CHANCE = {
    "attribute": 0.25, "count": 0.25, "existence": 0.5, "spatial": 0.25, "comparison": 0.5, "sound": 0.2,
    "sound_count": 0.25, "direction": 0.25, "order": 0.5, "solid": 0.2, "solid_size": 0.5, "motion": 1 / 6,
    "sound_colour": 1 / 6, "sound_direction": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("family", ALL)
def test_the_question_text_does_not_give_the_answer(asked, family):
    """A table of the commonest answer per wording, fitted on train, stays near chance on val."""
    table, overall = defaultdict(Counter), Counter()
    for text, answer in asked[family]:
        table[text][answer] += 1
        overall[answer] += 1
    right = total = 0
    for i in range(1200):
        scene = make_scene(0, "val", i)
        for question in questions(scene, (family,), scene.words()):
            guess = table.get(question.text, overall).most_common(1)[0][0]
            right += guess == question.answer
            total += 1
    assert total > 300 and right / total < CHANCE[family] + 0.06


def test_every_family_has_three_wordings_and_one_word_answers(asked):
    for family, pairs in asked.items():
        texts = {text for text, _ in pairs}
        for word in (*SHAPES, *COLOURS):
            texts = {text.replace(word, "X") for text in texts}
        assert len(texts) >= 3
        assert {answer for _, answer in pairs} <= set(FAMILIES[family].answers)
        assert all(" " not in answer for _, answer in pairs)


def test_cross_modal_questions_are_undecidable_from_one_modality(scenes):
    """For the same picture any thing may sound; for the same sound any colour and direction may be right."""
    colours, directions = defaultdict(set), defaultdict(set)
    for scene in scenes:
        told = {q.family: q.answer for q in questions(scene, ("sound_colour", "sound_direction"), scene.words())}
        shape = scene.sounding.shape
        if "sound_colour" in told:
            colours[shape].add(told["sound_colour"])
            # Were another thing to sound, the picture would be the same and the answer another.
            turned = replace(scene, things=(*scene.things[1:], scene.things[0]))
            assert facts(turned, "image").split(" The ")[0] == facts(scene, "image").split(" The ")[0]
            assert turned.sounding.colour != scene.sounding.colour
            assert len(set(scene.colours)) >= 3
        if "sound_direction" in told:
            directions[shape].add(told["sound_direction"])
            assert len({move for move in scene.moves if move}) == 2
    assert all(len(colours[shape]) == 5 and len(directions[shape]) == 4 for shape in SHAPES)


def test_answers_follow_from_the_scene(scenes):
    for scene in scenes[:200]:
        by_shape = {t.shape: t for t in scene.things}
        for q in questions(scene, ALL, scene.words()):
            named = sorted((s for s in SHAPES if s in q.text), key=q.text.index)
            if q.family == "existence":
                pair = next((c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" in q.text)
                assert (q.answer == "yes") == (pair in {(t.colour, t.shape) for t in scene.things})
            elif q.family == "comparison":
                want = "small" if "smaller" in q.text else "large"
                assert by_shape[q.answer].size == want and q.answer in named and len(named) == 2
            elif q.family == "order":
                assert q.answer == scene.things[scene.blinks[0]].shape and len(named) == 2
            elif q.family == "count":
                colour = next((c for c in COLOURS if c in q.text.split() or f"{c}?" in q.text), None)
                number = len(scene.things) if colour is None else scene.colours.count(colour)
                assert q.answer == ("zero", "one", "two", "three", "four")[number]


def test_text_only_questions_are_decided_by_their_description():
    for i in range(100):
        scene = make_scene(0, "train-text", i)
        for _, sample in text_samples(scene):
            assert not sample.media()
            kind, text, answer = sample.meta["kind"], sample.messages[0].text, sample.messages[1].text
            if kind in ("sound_colour", "attribute"):
                thing = scene.things[0]
                assert f"{thing.colour} {thing.shape}" in text and answer in (thing.colour, thing.shape)
            if kind == "spatial":
                assert f" is {answer}" in text


# -- media


def by_name(scene):
    return {thing.shape: (index, thing) for index, thing in enumerate(scene.things)}


def test_details_name_two_things_before_they_compare_them(scenes):
    compared = 0
    for scene in scenes[:200]:
        things = by_name(scene)
        told = details(scene, ("image",), scene.words(2))
        for other, one, where in re.findall(r"Seen from the (\w+), the (\w+) is (\w+)\.", told):
            assert holds(things[one][1].xy, things[other][1].xy, where)
            compared += 1
        for one, other, again, how in re.findall(r"Of the (\w+) and the (\w+), the (\w+) is (\w+)\.", told):
            assert again == one and things[one][1].size == {"larger": "large", "smaller": "small"}[how]
            assert things[one][1].size != things[other][1].size
            compared += 1
    assert compared > 400


def test_picture_shows_the_things_in_their_colours():
    for i in range(20):
        scene = make_scene(0, "val", i)
        pixels = np.asarray(Image.open(io.BytesIO(picture_png(scene)))).astype(int)
        assert pixels.shape == (64, 64, 3) and np.array_equal(pixels, picture(scene))
        for thing in scene.things:
            near = np.abs(pixels - COLOURS[thing.colour]).max(axis=2) < 12
            share = AREAS_PX[thing.size] * scene.colours.count(thing.colour)
            assert near.sum() > 0.4 * AREAS_PX[thing.size] and near.sum() < 4 * share
            x, y = (int(v) for v in thing.xy)
            assert near[y, x]


def test_large_is_clearly_larger_than_small_for_every_pair_of_shapes():
    base = make_scene(0, "val", 0).things[0]
    areas = {}
    for shape in SHAPES:
        for size in AREAS_PX:
            thing = replace(base, shape=shape, size=size, colour="blue", xy=(32.0, 32.0))
            pixels = picture(replace(make_scene(0, "val", 0), things=(thing,))).astype(int)
            areas[shape, size] = (np.abs(pixels - COLOURS["blue"]).max(axis=2) < 100).sum()
    small = [area for (_, size), area in areas.items() if size == "small"]
    large = [area for (_, size), area in areas.items() if size == "large"]
    assert min(large) > 2 * max(small)


def test_video_survives_the_file_and_moves_and_blinks_as_told():
    for i in range(20):
        scene = make_scene(0, "val", i)
        frames, palette = video_indices(scene)
        gif = Image.open(io.BytesIO(video_gif(scene)))
        assert gif.n_frames == len(frames) == 8
        for f in range(8):
            gif.seek(f)
            assert np.array_equal(np.asarray(gif.convert("RGB")), palette[frames[f]])
        blink_at = [[f for f in range(8) if _centre(scene, frames, f, k) == 10] for k in scene.blinks]
        assert all(len(at) == 2 for at in blink_at)
        assert sorted(blink_at) == blink_at


def _centre(scene, frames, f, k):
    x, y = np.array(scene.things[k].video_xy) + np.array(STEPS[scene.moves[k]]) * STEP_PX * f
    return frames[f, int(y), int(x)]


def test_gif_refuses_indices_outside_the_palette():
    with pytest.raises(DataError, match=r"palette of 2 colours; expected .* every index inside"):
        encode_gif(np.full((1, 4, 4), 2, dtype=np.uint8), np.zeros((2, 3), dtype=np.uint8), 8)


def test_sound_repeats_with_gaps():
    for i in range(40):
        scene = make_scene(0, "val", i)
        wave, rate = soundfile.read(io.BytesIO(sound_wav(scene)), dtype="int16")
        assert rate == RATE_HZ and wave.shape == (9600,) and np.array_equal(wave, sound(scene))
        level = np.abs(wave / 32768).reshape(-1, 160).max(axis=1)
        loud = level > 0.04
        assert (np.diff(loud.astype(int)) == 1).sum() == scene.sound_count
        assert np.abs(wave).max() < 32767


def test_voices_differ():
    flat = {}
    for i in range(60):
        scene = make_scene(0, "val", i)
        spectrum = np.abs(np.fft.rfft(sound(scene).astype(float))) ** 2
        flat.setdefault(SOUNDS[scene.sounding.shape], []).append(np.exp(np.log(spectrum + 1).mean()) / spectrum.mean())
    assert min(flat["hiss"]) > max(flat["beep"])


def test_solids_have_their_size_and_colour():
    seen = set()
    for i in range(40):
        scene = make_scene(0, "val", i)
        kind, size, colour = scene.solid
        seen.add(kind)
        points, colours = cloud(scene)
        assert points.shape == (512, 3) and colours.dtype == np.uint8
        assert np.abs(colours.astype(int) - COLOURS[colour]).max() <= 12
        reach = np.abs(points).max() / SCALES[size]
        assert 0.6 < reach < 1.4
        data = cloud_ply(scene)
        body = data[data.index(b"end_header\n") + 11 :]
        records = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
        assert np.array_equal(records["xyz"], points) and np.array_equal(records["rgb"], colours)
    assert seen == set(SOLIDS)


def test_motions_differ_as_named():
    for i in range(60):
        scene = make_scene(0, "val", i)
        x_T6 = recording(scene)
        strength = np.linalg.norm(x_T6[:, :3], axis=1)
        assert abs(np.median(strength) - 1) < 0.6 or scene.motion == "shake"
        assert (strength.min() < 0.15 and np.sort(strength)[14] < 0.15) == (scene.motion == "drop")
        assert (np.abs(x_T6[:, 5]).max() > 120) == (scene.motion == "spin")
        if scene.motion == "still":
            assert np.abs(strength - 1).max() < 0.12
    assert set(MOTIONS) == {make_scene(0, "val", i).motion for i in range(6)}


def test_recordings_are_csv_with_time_and_channels():
    rows = recording_csv(make_scene(0, "val", 0)).decode().splitlines()
    assert rows[0] == "time," + ",".join(CHANNELS) and len(rows) == 101
    table = np.array([[float(v) for v in row.split(",")] for row in rows[1:]])
    assert np.allclose(np.diff(table[:, 0]), 0.02)
    assert np.allclose(table[:, 1:], recording(make_scene(0, "val", 0)), atol=0.06)


# -- the folder


def test_folder_holds_media_and_lines_that_load(folder):
    out, summary = folder
    assert json.loads((out / "scenes.json").read_text()) == summary
    for split, number in (("train", 12), ("val", 5), ("novel", 5)):
        for medium in MEDIA:
            assert len(list((out / split / "media" / medium).iterdir())) == number
        for name, expected in (
            ("views", 5 * number),
            ("objects", 2 * number),
            ("pairs", number),
            ("names", 2 * number),
            ("hub", number),
            ("captions", 5 * number),
        ):
            assert len(lines(out / split / f"{name}.jsonl")) == expected
        ids = []
        for file in (out / split).glob("*.jsonl"):
            for data in lines(file):
                sample = sample_from_json(data, out / split, "?")
                assert all(part.path.exists() for part in sample.media())
                ids.append(sample.id)
        assert len(ids) == len(set(ids))
        answers = Counter((d["meta"]["family"], d["meta"]["answer"]) for d in lines(out / split / "questions.jsonl"))
        told = summary["answers"][split]
        assert answers == {(family, a): n for family, counts in told.items() for a, n in counts.items()}


def test_an_object_stands_alone_and_its_name_says_its_kind(folder, scenes):
    out, _ = folder
    names = lines(out / "val" / "names.jsonl")
    for index, data in enumerate(lines(out / "val" / "objects.jsonl")):
        scene = make_scene(3, "val", index // 2)
        thing = scene.things[0]
        medium = ("image", "video")[index % 2]
        expected = {
            "image": f"A {thing.shape}.",
            "video": f"A {thing.shape} moves {scene.moves[0]}.",
        }[medium]
        assert data["views"]["text"] == data["label"] == expected
        named = names[index]["messages"][1]["content"].split()
        assert thing.colour in named and named[3 if medium == "image" else 2].strip(".") == thing.shape
        assert (out / "val" / data["views"][medium]["path"]).is_file()
    for scene in scenes[:200]:
        single = alone(scene)
        shown = picture(single).astype(int)
        colour = np.array(COLOURS[scene.things[0].colour])
        is_thing = np.abs(shown - colour).sum(axis=2) < 40
        assert 0.5 < is_thing.sum() / AREAS_PX[scene.things[0].size] < 1.3
        saturation = shown.max(axis=2) - shown.min(axis=2)
        assert (saturation[~is_thing] > 30).sum() < 120, "only the edge of the one thing has colour besides it"


def test_a_pair_tells_by_kind_alone_who_moves_where_and_blinks_first(folder):
    out, _ = folder
    for index, data in enumerate(lines(out / "train" / "pairs.jsonl")):
        two = paired(make_scene(3, "train", index))
        shapes = [thing.shape for thing in two.things]
        text = data["views"]["text"]
        assert len(set(shapes)) == 2 and not any(colour in text for colour in COLOURS)
        for shape, move in zip(shapes, two.moves, strict=True):
            assert f"the {shape} {f'moves {move}' if move else 'stays'}" in text.lower()
        order = text.lower().split(". ")[1]
        assert order.index(shapes[two.blinks[0]]) < order.index(shapes[two.blinks[1]])
        assert (out / "train" / data["views"]["video"]["path"]).is_file()


def test_in_pairs_nothing_but_looking_tells_who_moves():
    two = [paired(make_scene(0, "train", index)) for index in range(3000)]
    kinds = Counter(tuple(bool(move) for move in scene.moves) for scene in two)
    assert set(kinds) == {(True, False), (False, True), (True, True)} and min(kinds.values()) > 900
    for way in DIRECTIONS:
        assert 0.2 < sum(scene.moves[1] == way for scene in two) / sum(bool(scene.moves[1]) for scene in two) < 0.3
    assert 0.45 < sum(scene.blinks == (0, 1) for scene in two) / len(two) < 0.55
    assert all(len(set(scene.moves)) == 2 for scene in two), "both never move alike"


def test_questions_hold_only_the_media_they_need(folder):
    out, _ = folder
    for data in lines(out / "train" / "questions.jsonl"):
        kinds = [part["type"] for part in data["messages"][0]["content"]]
        assert kinds == [*FAMILIES[data["meta"]["family"]].media, "text"] == [*data["meta"]["modalities"], "text"]
        assert data["messages"][1]["content"] == data["meta"]["answer"]


def test_same_seed_same_bytes_in_any_number_of_scenes_and_processes(folder, tmp_path):
    out, _ = folder
    seen = []
    make_scenes(tmp_path / "b", 7, 0, 2, seed=3, processes=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9, 9)
    for path in sorted((tmp_path / "b" / "train" / "media").rglob("*.*")):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "b")).read_bytes()
    for name in ("questions", "text"):
        few = (tmp_path / "b" / "train" / f"{name}.jsonl").read_text()
        assert few and (out / "train" / f"{name}.jsonl").read_text().startswith(few)


def test_a_finished_folder_is_kept_an_interrupted_one_made_again_and_a_foreign_one_refused(tmp_path):
    summary = make_scenes(tmp_path / "s", 2, 1, 0, families=["solid"])
    stamp = (tmp_path / "s" / "scenes.json").stat().st_mtime_ns
    assert make_scenes(tmp_path / "s", 2, 1, 0, families=["solid"]) == summary
    assert (tmp_path / "s" / "scenes.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"other settings.*found .*seed 0.*expected .*seed 1"):
        make_scenes(tmp_path / "s", 2, 1, 0, families=["solid"], seed=1)
    (tmp_path / "s" / "scenes.json").unlink()
    (tmp_path / "s" / "train" / "views.jsonl").write_text("half a li")
    assert make_scenes(tmp_path / "s", 2, 1, 0, families=["solid"]) == summary
    assert len(lines(tmp_path / "s" / "train" / "views.jsonl")) == 10
    (tmp_path / "s" / "scenes.json").write_text("{")
    with pytest.raises(DataError, match=r"an unreadable scenes.json"):
        make_scenes(tmp_path / "s", 2, 1, 0)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"'thesis.txt'.*choose an empty folder"):
        make_scenes(tmp_path / "home", 1, 1, 1)


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(DataError, match=r"unknown question family 'sond'; did you mean 'sound'"):
        make_scenes(tmp_path, families=["sond"])
    with pytest.raises(DataError, match=r"processes 0; expected .* at least 1 process"):
        make_scenes(tmp_path, processes=0)
