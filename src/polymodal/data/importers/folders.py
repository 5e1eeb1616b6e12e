"""Folders of media, one folder a class -> view sets with a label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, DataError
from polymodal.core.parts import MODALITIES, MODALITY_OF_EXTENSION, Part, Text, media_part
from polymodal.core.samples import Sample
from polymodal.data.importers.report import ImportReport, PathLike, finish, problem_with


def import_folder(src: PathLike, out: PathLike, *, modality: str = "image", caption: str | None = None) -> ImportReport:
    """Import ``src/<class>/.../<file>``: the label is the name of the first folder below ``src``.

    Args:
        src: the folder.
        out: the JSON Lines file to write.
        modality: which files to take, by their extension; others are reported.
        caption: a text view to add, in which ``{}`` stands for the class, as in ``a photo of a {}``.

    Raises:
        ConfigError: if ``modality`` names no media, or ``caption`` lacks ``{}``.
        DataError: if ``src`` is no folder, or nothing could be imported.
    """
    if modality not in MODALITIES[1:]:
        raise ConfigError(unknown("modality", modality, MODALITIES[1:]))
    if caption is not None and "{}" not in caption:
        raise ConfigError(f"caption {caption!r}: expected a text with {{}} where the class stands")
    root = Path(src)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    report = ImportReport()
    return finish(report, src, out, _samples(root, modality, caption, report, Path(out)))


def _samples(root: Path, modality: str, caption: str | None, report: ImportReport, out: Path) -> Iterator[Sample]:
    for path in sorted(root.rglob("*")):
        if path.is_dir() or path.absolute() == out.absolute() or path.name == f".{out.name}.part":
            continue
        name = path.relative_to(root).as_posix()
        reason = _refusal(path, root, modality)
        if reason is not None:
            report.skip(name, reason)
            continue
        label = path.relative_to(root).parts[0]
        views: dict[str, Part] = {modality: media_part(modality, path)}
        if caption is not None:
            views["text"] = Text(caption.replace("{}", label))
        yield Sample(report.unique_id(name), views=views, label=label)


def _refusal(path: Path, root: Path, modality: str) -> str | None:
    if path.name.startswith("."):
        return "is hidden: its name begins with a dot"
    found = MODALITY_OF_EXTENSION.get(path.suffix.lower())
    # .npy may be points or sensors; the caller has said which.
    if found != modality and not (path.suffix.lower() == ".npy" and modality in ("points", "sensor")):
        return f"the extension {path.suffix!r} is no {modality}"
    if path.parent == root:
        return "lies in no class folder"
    return problem_with(path)
