"""A look at a data source before it is trained on: what is in it, how large, and what is broken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from polymodal.core.errors import MediaError, SampleError
from polymodal.core.limits import Limits
from polymodal.core.parts import Media, Text
from polymodal.core.samples import Sample
from polymodal.data.sources import JsonlSource, duplicate_ids, open_source
from polymodal.modalities.audio import decode_audio, probe_audio
from polymodal.modalities.image import decode_image, probe_image
from polymodal.modalities.points import decode_points, probe_points
from polymodal.modalities.sensor import decode_sensor, probe_sensor
from polymodal.modalities.video import iter_frames, probe_video

Measures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, middle and largest of ``count`` numbers."""

    count: int
    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken thing: the sample it is in, the media file (empty for a malformed line), and what is wrong."""

    sample: str
    item: str
    reason: str


@dataclass(slots=True)
class Inspection:
    """What :func:`inspect_source` found.

    Args:
        path: the file.
        samples: lines that are not blank; of them ``conversations``, ``view_sets`` and malformed ones.
        conversations: samples with messages.
        view_sets: samples with views.
        labelled: samples with a label.
        turns: messages by role.
        modalities: samples that hold a modality, by its name; text included.
        items: media items by modality; a file that several samples use counts each time.
        files: distinct media files by modality.
        sizes: per modality and measure, the spread over distinct media; from headers.
        text_chars: characters of ``user``, ``assistant`` and ``system`` turns and of ``view`` texts.
        malformed: lines that are no samples.
        missing: media files that are not there, once per sample.
        broken: media that are damaged, unsupported or above the limits, once per sample.
        duplicate_ids: ids that several samples share, with the number of samples.
        decoded: whether media were decoded whole, or only their headers read.
    """

    path: str
    samples: int = 0
    conversations: int = 0
    view_sets: int = 0
    labelled: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    modalities: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, dict[str, Spread]] = field(default_factory=dict)
    text_chars: dict[str, Spread] = field(default_factory=dict)
    malformed: list[Problem] = field(default_factory=list)
    missing: list[Problem] = field(default_factory=list)
    broken: list[Problem] = field(default_factory=list)
    duplicate_ids: dict[str, int] = field(default_factory=dict)
    decoded: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether nothing is malformed, missing, broken or doubled."""
        return not (self.malformed or self.missing or self.broken or self.duplicate_ids)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect_source(path: str | os.PathLike[str], limits: Limits | None = None, *, decode: bool = False) -> Inspection:
    """Read every sample, and the header of every media file once.

    Args:
        path: a JSON Lines file, or a folder with ``data.jsonl``.
        limits: what counts as too large; by default the standard limits.
        decode: decode every file whole instead, which also finds damage behind the header; much slower.

    Raises:
        DataError: if the source as a whole cannot be read.
        MissingExtraError: if a format needs a package that is not installed.
    """
    source = open_source(path)
    survey = _Survey(source, limits or Limits(), decode)
    for index in range(len(source)):
        survey.add(index)
    return survey.result()


class _Survey:
    """Counts while samples pass by."""

    def __init__(self, source: JsonlSource, limits: Limits, decode: bool) -> None:
        self._source = source
        self._limits = limits
        self._decode = decode
        self._found = Inspection(source.name, samples=len(source), decoded=decode)
        self._turns: Counter[str] = Counter()
        self._modalities: Counter[str] = Counter()
        self._items: Counter[str] = Counter()
        self._chars: dict[str, list[float]] = {}
        self._seen: dict[tuple[object, ...], Measures | MediaError] = {}
        self._sizes: dict[str, dict[str, list[float]]] = {}

    def add(self, index: int) -> None:
        """Take one sample in."""
        try:
            sample = self._source[index]
        except SampleError as error:
            self._found.malformed.append(Problem(error.sample, "", error.problem))
            return
        if sample.messages:
            self._found.conversations += 1
        else:
            self._found.view_sets += 1
        self._found.labelled += sample.label is not None
        self._add_text(sample)
        for part in sample.media():
            self._items[part.modality] += 1
            self._add_media(sample.id, part)

    def _add_text(self, sample: Sample) -> None:
        here = {part.modality for part in sample.media()}
        for message in sample.messages:
            self._turns[message.role] += 1
            texts = [part.text for part in message.parts if isinstance(part, Text)]
            if texts:
                here.add("text")
                self._chars.setdefault(message.role, []).append(sum(map(len, texts)))
        for view in sample.views.values():
            if isinstance(view, Text):
                here.add("text")
                self._chars.setdefault("view", []).append(len(view.text))
        self._modalities.update(here)

    def _add_media(self, id: str, part: Media) -> None:
        if part.path is not None and not part.path.exists():
            self._found.missing.append(Problem(id, part.name, "the file is missing"))
            return
        # Details such as a stated rate are part of what is measured, so they are part of the key.
        details = tuple(getattr(part, name, None) for name in ("rate_hz", "fps", "channels"))
        key = (part.modality, str(part.path) if part.path is not None else part.content_key(), *details)
        if key not in self._seen:
            self._seen[key] = self._measure(part)
        known = self._seen[key]
        if isinstance(known, MediaError):
            self._found.broken.append(Problem(id, known.item, known.problem))

    def _measure(self, part: Media) -> Measures | MediaError:
        try:
            if self._decode:
                _DECODERS[part.modality](part, self._limits)
            measures = _PROBES[part.modality](part, self._limits)
        except MediaError as error:
            return error
        sizes = self._sizes.setdefault(part.modality, {})
        for name, value in measures.items():
            sizes.setdefault(name, []).append(value)
        return measures

    def result(self) -> Inspection:
        """The inspection."""
        found = self._found
        found.turns, found.modalities = _sorted(self._turns), _sorted(self._modalities)
        found.items = _sorted(self._items)
        found.files = _sorted(Counter(str(key[0]) for key in self._seen))
        found.sizes = {
            modality: {name: _spread(values) for name, values in sizes.items()}
            for modality, sizes in sorted(self._sizes.items())
        }
        found.text_chars = {name: _spread(values) for name, values in sorted(self._chars.items())}
        found.duplicate_ids = {id: len(indices) for id, indices in duplicate_ids(self._source).items()}
        return found


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(len(values), float(min(values)), float(np.median(values)), float(max(values)))


def _image(part: Any, limits: Limits) -> Measures:
    header = probe_image(part, limits)
    return {"width_px": header.width_px, "height_px": header.height_px}


def _audio(part: Any, limits: Limits) -> Measures:
    header = probe_audio(part, limits)
    return {"duration_s": header.duration_s, "rate_hz": header.rate_hz, "channels": header.channels}


def _video(part: Any, limits: Limits) -> Measures:
    header = probe_video(part, limits)
    return {
        "duration_s": header.duration_s,
        "frames": header.num_frames,
        "fps": header.fps,
        "width_px": header.width_px,
        "height_px": header.height_px,
    }


def _points(part: Any, limits: Limits) -> Measures:
    return {"points": probe_points(part, limits).num_points}


def _sensor(part: Any, limits: Limits) -> Measures:
    header = probe_sensor(part, limits)
    return {
        "duration_s": header.duration_s,
        "rows": header.num_rows,
        "rate_hz": header.rate_hz,
        "channels": header.num_channels,
    }


def _decode_video(part: Any, limits: Limits) -> None:
    header = probe_video(part, limits)
    for _ in iter_frames(part, limits, header, range(header.num_frames)):
        pass


_PROBES: dict[str, Callable[[Any, Limits], Measures]] = {
    "image": _image,
    "audio": _audio,
    "video": _video,
    "points": _points,
    "sensor": _sensor,
}
_DECODERS: dict[str, Callable[[Any, Limits], object]] = {
    "image": decode_image,
    "audio": decode_audio,
    "video": _decode_video,
    "points": decode_points,
    "sensor": decode_sensor,
}
