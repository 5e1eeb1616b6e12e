"""Writes the corpus: media files, and JSON Lines that put them into views, captions, questions and plain text.

A scene's lines and files depend on (seed, split, index) alone, so they are the same whatever the number of scenes,
the number of processes or the families asked for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from polymodal.core.config import unknown
from polymodal.core.errors import DataError
from polymodal.core.parts import Media, Part, Text, media_part
from polymodal.core.samples import Message, Sample, sample_to_json
from polymodal.data.scenes.captions import (
    MEDIA,
    NAMING,
    REQUESTS,
    caption,
    facts,
    object_kind,
    object_name,
    pair_facts,
    pair_kinds,
)
from polymodal.data.scenes.details import DETAIL_REQUESTS, LOOKUP_MEDIA, details, lookups
from polymodal.data.scenes.drills import DRILL_MEDIA, drills
from polymodal.data.scenes.latent import HELD_OUT, SPLITS, Scene, alone, make_scene, paired
from polymodal.data.scenes.motion import recording_csv
from polymodal.data.scenes.picture import picture_png, video_gif
from polymodal.data.scenes.questions import FAMILIES, Question, questions
from polymodal.data.scenes.reading import reading
from polymodal.data.scenes.solid import cloud_ply
from polymodal.data.scenes.sound import sound_wav

FILES = (
    "views",
    "objects",
    "pairs",
    "hub",
    "names",
    "captions",
    "details",
    "lookups",
    "drills",
    "questions",
    "dialogues",
    "text",
    "reading",
)
"""The JSON Lines files of each split."""
SUMMARY = "scenes.json"
VERSION = 7
"""Raised whenever the same seed gives other files."""

ALONE = ("image", "video")
"""The media that show one thing alone in ``objects``."""

_EXTENSIONS = {"image": "png", "audio": "wav", "video": "gif", "points": "ply", "sensor": "csv"}
_RENDERERS: dict[str, Callable[[Scene], bytes]] = {
    "image": picture_png,
    "audio": sound_wav,
    "video": video_gif,
    "points": cloud_ply,
    "sensor": recording_csv,
}
_CHUNK = 100
_TEXT_QUESTIONS = 3

Progress = Callable[[int, int], None]
Lines = dict[str, list[str]]
Counts = dict[str, Counter[str]]


def make_scenes(
    out: str | os.PathLike[str],
    num_train: int = 4000,
    num_val: int = 500,
    num_novel: int = 300,
    *,
    seed: int = 0,
    families: Iterable[str] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the corpus to ``out`` and return its summary, which is also ``out/scenes.json``.

    A folder with the same settings is left as it is; one that was interrupted is made again. Each split holds
    ``media/<kind>/000123.<ext>`` and twelve JSON Lines files:

    - ``views``: one line per scene and medium: the medium and its caption; ``label`` holds its facts;
    - ``objects``: two lines per scene: one of its things alone, as a picture with its kind and as a video with its kind
      and direction; ``label`` is that text;
    - ``pairs``: one video per scene of two things, with their kinds, how they move and which blinks first;
    - ``hub``: one line per scene: picture, sound, video and the picture's caption;
    - ``names``: two conversations per scene: what the thing of ``objects`` is, with its colour and size;
    - ``captions``: one conversation per scene and medium, asking for a description;
    - ``details``: one conversation per scene and set of media: what is true of each thing, by its name;
    - ``lookups``: one conversation per picture and per video: short questions about things by their names;
    - ``drills``: up to seventeen conversations per picture and eight per video: one short question each, of more kinds;
    - ``questions``: one conversation per scene and family; ``meta`` has family, answer, modalities;
    - ``dialogues``: the same questions and descriptions as turns of one conversation per scene and set of media;
    - ``text``: conversations without media, about other scenes: descriptions, and questions about a description;
    - ``reading``: conversations without media: things listed in a few words, and one question about them, or a request
      to describe them.

    Args:
        out: the folder; made if absent.
        num_train: scenes of the split ``train``.
        num_val: scenes of ``val``: other scenes of the same distribution.
        num_novel: scenes of ``novel``: each holds a (colour, shape) pair that the other splits never show or name.
        seed: of everything.
        families: the question families to write; all by default.
        processes: how many processes render.
        progress: called with (scenes done, scenes in all).

    Raises:
        DataError: if ``out`` holds something else, a count is negative, or a family is unknown.
    """
    names = tuple(FAMILIES) if families is None else tuple(families)
    for name in names:
        if name not in FAMILIES:
            raise DataError(unknown("question family", name, FAMILIES))
    counts = dict(zip(SPLITS, (num_train, num_val, num_novel), strict=True))
    if min(counts.values()) < 0 or seed < 0 or processes < 1:
        raise DataError(
            f"found counts {counts}, seed {seed}, processes {processes}; expected counts and seed of at least 0 "
            "and at least 1 process"
        )
    settings = {"corpus": "scenes", "version": VERSION, "seed": seed, "scenes": counts, "families": list(names)}
    root = Path(out)
    found = _existing(root, settings)
    if found is not None:
        return found
    answers = _write_splits(root, counts, seed, names, _jobs(processes), progress)
    summary = {
        **settings,
        "held_out": [list(pair) for pair in HELD_OUT],
        "media": {medium: _EXTENSIONS[medium] for medium in MEDIA},
        "modalities": {name: list(FAMILIES[name].media) for name in names},
        "answers": answers,
    }
    partial_file = root / (SUMMARY + ".part")
    partial_file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(root / SUMMARY)
    return summary


def _existing(root: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished corpus with these settings; clears the remains of an interrupted one."""
    if not root.exists() or not any(root.iterdir()):
        return None
    file = root / SUMMARY
    if file.exists():
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            summary = None
        if isinstance(summary, dict) and all(summary.get(key) == value for key, value in settings.items()):
            return summary
        raise DataError(
            f"{root} holds scenes made with other settings; found {_brief(summary)}, expected {_brief(settings)}. "
            "Choose another folder, or remove this one"
        )
    foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in (*SPLITS, SUMMARY + ".part"))
    if foreign:
        raise DataError(f"{root} holds {foreign[0]!r}, which is no part of a scenes corpus; choose an empty folder")
    for split in SPLITS:
        shutil.rmtree(root / split, ignore_errors=True)
    return None


def _brief(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "an unreadable scenes.json"
    return ", ".join(f"{key} {settings.get(key)}" for key in ("version", "seed", "scenes", "families"))


Job = Callable[[list[tuple[Any, ...]]], Iterator[tuple[Lines, Counts, int]]]


def _jobs(processes: int) -> Job:
    """What runs the chunks, in order: this process, or a pool."""

    def here(tasks: list[tuple[Any, ...]]) -> Iterator[tuple[Lines, Counts, int]]:
        return map(_write_chunk, tasks)

    def pool(tasks: list[tuple[Any, ...]]) -> Iterator[tuple[Lines, Counts, int]]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as executor:
            yield from executor.map(_write_chunk, tasks)

    return here if processes == 1 else pool


def _write_splits(
    root: Path, counts: dict[str, int], seed: int, families: tuple[str, ...], run: Job, progress: Progress | None
) -> dict[str, dict[str, dict[str, int]]]:
    """Write media and lines of every split; returns how often each answer stands, per split and family."""
    tasks = []
    for split, number in counts.items():
        for folder in (*MEDIA, *(f"object_{medium}" for medium in ALONE), "pair_video"):
            (root / split / "media" / folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (root / split / f"{name}.jsonl").write_bytes(b"")
        for start in range(0, number, _CHUNK):
            tasks.append((str(root / split), seed, split, range(start, min(start + _CHUNK, number)), families))
    answers: dict[str, Counts] = {split: {name: Counter() for name in families} for split in counts}
    done = 0
    for task, (lines, counted, number) in zip(tasks, run(tasks), strict=True):
        for name, new in lines.items():
            with (root / task[2] / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(new)
        for family, counter in counted.items():
            answers[task[2]][family].update(counter)
        done += number
        if progress is not None:
            progress(done, sum(counts.values()))
    return {
        split: {family: dict(sorted(counter.items())) for family, counter in of_split.items()}
        for split, of_split in answers.items()
    }


def _write_chunk(task: tuple[str, int, str, range, tuple[str, ...]]) -> tuple[Lines, Counts, int]:
    """Render the media of some scenes and return their lines."""
    folder, seed, split, indices, families = task
    lines: Lines = {name: [] for name in FILES}
    counted: Counts = {name: Counter() for name in families}
    for index in indices:
        scene = make_scene(seed, split, index)
        for medium, render in _RENDERERS.items():
            with open(os.path.join(folder, _path(scene, medium)), "wb") as file:
                file.write(render(scene))
        for medium in ALONE:
            with open(os.path.join(folder, _path(scene, medium, "object_")), "wb") as file:
                file.write(_RENDERERS[medium](alone(scene)))
        with open(os.path.join(folder, _path(scene, "video", "pair_")), "wb") as file:
            file.write(video_gif(paired(scene)))
        for name, sample in (
            *scene_samples(scene, families),
            *text_samples(make_scene(seed, f"{split}-text", index), families),
            *reading_samples(seed, split, index),
        ):
            lines[name].append(json.dumps(sample_to_json(sample)) + "\n")
            if name == "questions":
                counted[sample.meta["family"]][sample.meta["answer"]] += 1
    return lines, counted, len(indices)


def _path(scene: Scene, medium: str, prefix: str = "") -> str:
    return f"media/{prefix}{medium}/{scene.index:06d}.{_EXTENSIONS[medium]}"


def scene_samples(scene: Scene, families: tuple[str, ...] = tuple(FAMILIES)) -> Iterator[tuple[str, Sample]]:
    """(file, sample) for every line that a scene's media have; paths are relative to the split's folder."""
    words = scene.words()
    name = f"{scene.split}-{scene.index}"
    told = {medium: caption(scene, medium, words) for medium in MEDIA}
    part = {medium: media_part(medium, Path(_path(scene, medium))) for medium in MEDIA}
    for medium in MEDIA:
        meta = {"modality": medium, "scene": scene.index}
        views: dict[str, Part] = {medium: part[medium], "text": Text(told[medium])}
        yield "views", Sample(f"{name}-{medium}", views=views, label=facts(scene, medium), meta=meta)
        request = words.choice(REQUESTS[medium])
        yield "captions", _turn(f"{name}-{medium}-caption", [part[medium]], request, told[medium], meta)
    single = alone(scene)
    for medium in ALONE:
        shown = media_part(medium, Path(_path(scene, medium, "object_")))
        kind = object_kind(single, medium)
        meta = {"modality": medium, "scene": scene.index}
        views = {medium: shown, "text": Text(kind)}
        yield "objects", Sample(f"{name}-{medium}-object", views=views, label=kind, meta=meta)
        called = object_name(single, medium)
        yield "names", _turn(f"{name}-{medium}-name", [shown], words.choice(NAMING), called, meta)
    two = paired(scene)
    views = {
        "video": media_part("video", Path(_path(scene, "video", "pair_"))),
        "text": Text(pair_kinds(two, scene.words(4))),
    }
    yield "pairs", Sample(f"{name}-pair", views=views, label=pair_facts(two), meta={"scene": scene.index})
    views = {**{medium: part[medium] for medium in ("image", "audio", "video")}, "text": Text(told["image"])}
    yield "hub", Sample(f"{name}-hub", views=views, meta={"scene": scene.index})
    # Words of their own: what is told here changes nothing in the other files.
    chosen = scene.words(2)
    for media_names, asking in DETAIL_REQUESTS.items():
        meta = {"modalities": list(media_names), "scene": scene.index}
        parts = [part[medium] for medium in media_names]
        answer = details(scene, media_names, chosen)
        yield "details", _turn(f"{name}-{'-'.join(media_names)}-details", parts, chosen.choice(asking), answer, meta)
    for medium in LOOKUP_MEDIA:
        meta = {"modalities": [medium], "scene": scene.index}
        turns = lookups(scene, medium, chosen)
        yield "lookups", _conversation(f"{name}-{medium}-lookups", [part[medium]], turns, meta)
    drilled = scene.words(5)
    for medium in DRILL_MEDIA:
        meta = {"modalities": [medium], "scene": scene.index}
        for number, (text, answer) in enumerate(drills(scene, medium, drilled)):
            yield "drills", _turn(f"{name}-{medium}-drill-{number}", [part[medium]], text, answer, meta)
    asked = questions(scene, families, words)
    for question in asked:
        meta = {
            "family": question.family,
            "answer": question.answer,
            "modalities": list(question.media),
            "split": scene.split,
            "scene": scene.index,
        }
        media = [part[medium] for medium in question.media]
        yield "questions", _turn(f"{name}-{question.family}", media, question.text, question.answer, meta)
    requests = {medium: (words.choice(REQUESTS[medium]), told[medium]) for medium in MEDIA}
    for media_names, turns in _dialogues(asked, requests, words):
        meta = {"modalities": list(media_names), "scene": scene.index}
        parts = [part[medium] for medium in media_names]
        yield "dialogues", _conversation(f"{name}-{'-'.join(media_names)}-dialogue", parts, turns, meta)


def _dialogues(
    asked: list[Question], requests: dict[str, tuple[str, str]], words: random.Random
) -> Iterator[tuple[tuple[str, ...], list[tuple[str, str]]]]:
    """Per set of media that some question needs, the turns that those media can answer.

    Questions about one medium come in random order, before its description, which would give their answers away. A set
    of several media holds its own questions first: what needs both is never helped by an earlier answer about one.
    """
    for media in sorted({question.media for question in asked}):
        own = [(question.text, question.answer) for question in asked if question.media == media]
        if len(media) == 1:
            words.shuffle(own)
            own.append(requests[media[0]])
        else:
            others = [q for q in asked if len(q.media) == 1 and q.media[0] in media]
            own += [(q.text, q.answer) for q in words.sample(others, min(2, len(others)))]
        yield media, own


def text_samples(scene: Scene, families: tuple[str, ...] = tuple(FAMILIES)) -> Iterator[tuple[str, Sample]]:
    """("text", sample) for the text-only lines of a scene that has no media.

    A question stands behind descriptions that decide it, so that the answer follows from the text and not from habit.
    """
    words = scene.words()
    name = f"{scene.stream}-{scene.index}"
    medium = words.choice(MEDIA)
    request = words.choice(REQUESTS[medium])
    yield "text", _turn(f"{name}-caption", [], request, caption(scene, medium, words), {"kind": "caption"})
    asked = questions(scene, families, words)
    for question in words.sample(asked, min(_TEXT_QUESTIONS, len(asked))):
        told = " ".join(caption(scene, medium, words) for medium in question.media)
        yield (
            "text",
            _turn(
                f"{name}-{question.family}", [], f"{told} {question.text}", question.answer, {"kind": question.family}
            ),
        )


def reading_samples(seed: int, split: str, index: int) -> Iterator[tuple[str, Sample]]:
    """("reading", sample) for the lines of an index that list things in words."""
    for number, (kind, text, answer) in enumerate(reading(seed, split, index)):
        yield "reading", _turn(f"{split}-reading-{index}-{number}", [], text, answer, {"kind": kind})


def _conversation(id: str, media: list[Media], turns: list[tuple[str, str]], meta: dict[str, Any]) -> Sample:
    messages: list[Message] = []
    for index, (text, answer) in enumerate(turns):
        shown: list[Part] = list(media) if index == 0 else []
        messages += [Message("user", (*shown, Text(text))), Message("assistant", (Text(answer),))]
    return Sample(id, tuple(messages), meta=meta)


def _turn(id: str, media: list[Media], text: str, answer: str, meta: dict[str, Any]) -> Sample:
    return _conversation(id, media, [(text, answer)], meta)
