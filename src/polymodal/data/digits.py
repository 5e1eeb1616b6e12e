"""The corpus ``digits``: real handwriting, real speech and the words "zero" to "nine".

Only handwriting with word and speech with word are paired for training; handwriting and speech never are, so that
finding one with the other shows what the words have bound together.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from polymodal.core.config import unknown
from polymodal.core.errors import DataError, MissingExtraError
from polymodal.core.parts import Audio, Image, Part, Text
from polymodal.core.samples import Sample, sample_to_json
from polymodal.data.idx import read_idx

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILES = ("train_image_text", "train_speech_text", "eval_known", "eval_unseen")
SUMMARY = "digits.json"
VERSION = 1

_SIDE_PX = 28
_RECORDING = re.compile(r"([0-9])_([^_]+)_([0-9]+)\.wav")
_TRAIN_SHARE = 0.8

Progress = Callable[[int, int], None]
Recording = tuple[int, str, Path]
"""Digit, speaker, file."""


def make_digits(
    out: str | os.PathLike[str],
    audio: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    unseen_speaker: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the corpus to ``out`` and return its summary, which is also ``out/digits.json``.

    View sets, one a line; ``label`` is the word:

    - ``train_image_text.jsonl`` and ``train_speech_text.jsonl``: the only pairs to train on;
    - ``eval_known.jsonl``: handwriting, speech and word; unseen recordings of known speakers, unseen handwriting;
    - ``eval_unseen.jsonl``: the same with a speaker whom no training line holds.

    Recordings stay where they are (absolute paths, or relative ones below ``out``); handwriting is written as PNG.

    Args:
        out: the folder; made if absent.
        audio: folder of ``{digit}_{speaker}_{index}.wav``.
        images: folder with ``images-idx3-ubyte.gz`` and ``labels-idx1-ubyte.gz`` (gzip optional; a prefix such as
            ``t10k-`` is accepted); None takes the 1,797 digits that scikit-learn brings, 8 x 8, enlarged to 28 x 28.
        seed: of the split into train and evaluation, 80 to 20.
        unseen_speaker: who is kept for ``eval_unseen``; the last in alphabetical order by default.
        progress: called with (images written, images in all).

    Raises:
        DataError: if a folder or file is missing or damaged, there is no second speaker, or ``out`` holds other things.
        MissingExtraError: if ``images`` is None and scikit-learn is not installed.
    """
    root = Path(out)
    recordings = _recordings(Path(audio))
    speakers = sorted({speaker for _, speaker, _ in recordings})
    unseen = speakers[-1] if unseen_speaker is None else unseen_speaker
    if unseen not in speakers:
        raise DataError(unknown("speaker", unseen, speakers))
    if len(speakers) < 2:
        raise DataError(f"{audio}: found one speaker ({unseen}), expected at least two: one is kept for evaluation")
    settings = {
        "corpus": "digits",
        "version": VERSION,
        "seed": seed,
        "audio": str(Path(audio).resolve()),
        "images": None if images is None else str(Path(images).resolve()),
        "unseen_speaker": unseen,
    }
    found = _existing(root, settings)
    if found is not None:
        return found
    pictures, digits = _bundled() if images is None else _from_idx(Path(images))
    missing = sorted(set(range(10)) - set(digits.tolist()))
    if missing:
        raise DataError(f"{images}: found no handwritten {WORDS[missing[0]]!r}, expected all ten digits")
    rng = random.Random(seed)
    train_images, eval_images = _split(rng, enumerate(digits.tolist()), lambda item: item[1])
    known = [recording for recording in recordings if recording[1] != unseen]
    train_speech, eval_speech = _split(rng, known, lambda item: item[:2])
    other_speech = [recording for recording in recordings if recording[1] == unseen]
    _write_pictures(root / "images", pictures, progress)
    samples = {
        "train_image_text": [_view(f"image-{i}", digit, Image(_picture_path(root, i))) for i, digit in train_images],
        "train_speech_text": [_view(f"speech-{path.stem}", digit, Audio(path)) for digit, _, path in train_speech],
        "eval_known": _joined(root, "known", eval_speech, eval_images),
        "eval_unseen": _joined(root, "unseen", other_speech, eval_images),
    }
    summary = {
        **settings,
        "labels": list(WORDS),
        "speakers": speakers,
        "counts": {name: len(lines) for name, lines in samples.items()},
    }
    _write_lines(root, samples, summary)
    return summary


def _write_lines(root: Path, samples: dict[str, list[Sample]], summary: dict[str, Any]) -> None:
    """Write the view sets, and last of all the summary, which marks the folder as whole."""
    for name, lines in samples.items():
        text = "".join(json.dumps(sample_to_json(sample, root)) + "\n" for sample in lines)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    part = root / (SUMMARY + ".part")
    part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    part.replace(root / SUMMARY)


def _recordings(folder: Path) -> list[Recording]:
    """Every recording of the folder, in a fixed order."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected one with recordings named {{digit}}_{{speaker}}_{{index}}.wav"
        )
    result = []
    for path in sorted(folder.resolve().glob("*.wav")):
        match = _RECORDING.fullmatch(path.name)
        if match is None:
            raise DataError(
                f"{path}: found this name, expected {{digit}}_{{speaker}}_{{index}}.wav, as in 7_jackson_3.wav"
            )
        result.append((int(match[1]), match[2], path))
    missing = sorted(set(range(10)) - {digit for digit, _, _ in result})
    if missing:
        raise DataError(f"{folder}: found no recording of {WORDS[missing[0]]!r}, expected all ten digits")
    return result


def _bundled() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The handwriting that scikit-learn brings: images ``[1797, 28, 28]`` and digits ``[1797]``.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("sklearn", "data", "the bundled handwriting") from None
    data = load_digits()
    small = (data.images * (255 / 16)).round().astype(np.uint8)
    large = [
        np.asarray(Picture.fromarray(image).resize((_SIDE_PX, _SIDE_PX), Picture.Resampling.BICUBIC)) for image in small
    ]
    return np.stack(large), data.target.astype(np.uint8)


def _from_idx(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images_file, labels_file = (
        _find(folder, f"{kind}-idx{axes}-ubyte") for kind, axes in (("images", 3), ("labels", 1))
    )
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: found {len(images):,} images and {len(labels):,} labels, expected as many of each")
    if int(labels.max()) > 9:
        raise DataError(f"{labels_file}: found the label {int(labels.max())}, expected digits 0 to 9")
    return images, labels


def _find(folder: Path, ending: str) -> Path:
    found = sorted(path for suffix in ("", ".gz") for path in folder.glob(f"*{ending}{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: found {names}, expected one file named {ending} or {ending}.gz")
    return found[0]


def _split(rng: random.Random, items: Iterable[Any], key: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    """(train, evaluation): 80 to 20 within each group of equal key, with at least one item for evaluation."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    train, held = [], []
    for name in sorted(groups):
        group = groups[name]
        rng.shuffle(group)
        cut = min(len(group) - 1, round(_TRAIN_SHARE * len(group)))
        train += group[:cut]
        held += group[cut:]
    return train, held


def _joined(root: Path, name: str, speech: list[Recording], images: list[tuple[int, int]]) -> list[Sample]:
    """Every recording with a handwriting of its digit, each handwriting used as rarely as possible."""
    by_digit: dict[int, list[int]] = defaultdict(list)
    for i, digit in images:
        by_digit[digit].append(i)
    used: dict[int, int] = defaultdict(int)
    result = []
    for digit, _, path in speech:
        choice = by_digit[digit][used[digit] % len(by_digit[digit])]
        used[digit] += 1
        result.append(_view(f"{name}-{path.stem}", digit, Image(_picture_path(root, choice)), Audio(path)))
    return result


def _view(id: str, digit: int, *media: Part) -> Sample:
    views: dict[str, Part] = {part.modality: part for part in media}
    return Sample(id, views={**views, "text": Text(WORDS[digit])}, label=WORDS[digit])


def _picture_path(root: Path, index: int) -> Path:
    return root / "images" / f"{index:05d}.png"


def _write_pictures(folder: Path, pictures: NDArray[np.uint8], progress: Progress | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Picture.fromarray(picture).save(folder / f"{i:05d}.png", compress_level=1)
        if progress is not None and (i % 200 == 199 or i + 1 == len(pictures)):
            progress(i + 1, len(pictures))


def _existing(root: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished corpus with these settings; clears the remains of an interrupted one."""
    if not root.exists() or not any(root.iterdir()):
        return None
    if (root / SUMMARY).exists():
        try:
            summary = json.loads((root / SUMMARY).read_text(encoding="utf-8"))
        except ValueError:
            summary = {}
        if isinstance(summary, dict) and all(summary.get(key) == value for key, value in settings.items()):
            return summary
        raise DataError(f"{root} holds digits made with other settings; choose another folder, or remove this one")
    ours = {"images", SUMMARY + ".part", *(f"{name}.jsonl" for name in FILES)}
    foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in ours)
    if foreign:
        raise DataError(f"{root} holds {foreign[0]!r}, which is no part of a digits corpus; choose an empty folder")
    shutil.rmtree(root / "images", ignore_errors=True)
    return None
