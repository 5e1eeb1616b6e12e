"""COCO captions and instances -> view sets, or conversations about each image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.core.parts import Image, Text
from polymodal.core.samples import Sample, conversation
from polymodal.data.importers.jsonfile import objects, read_json
from polymodal.data.importers.report import ImportReport, PathLike, finish, image_folder, media_file, problem_with


def import_coco_captions(
    src: PathLike,
    out: PathLike,
    *,
    images: PathLike | None = None,
    conversations: bool = False,
    question: str = "Describe the image.",
) -> ImportReport:
    """Import captions: one sample a caption, a view set of image and text.

    The samples of one image share ``meta.image_id``.

    Args:
        src: the annotation file.
        out: the JSON Lines file to write.
        images: the folder of the images; by default ``images`` beside ``src``, or its folder.
        conversations: write conversations instead, with ``question`` and the caption as its answer.
        question: what the user says.

    Raises:
        DataError: if ``src`` is no caption file, or nothing could be imported.
    """
    path = Path(src)
    data = read_json(path)
    report = ImportReport()
    files = _Images(objects(data, "images", path), image_folder(path, images), report)
    found = _by_image(objects(data, "annotations", path), files, report)

    def samples() -> Iterator[Sample]:
        for image_id, file, items in files.with_annotations(found, "caption"):
            for annotation in items:
                name = f"{image_id}-{annotation.get('id', 'caption')}"
                caption = annotation.get("caption")
                if not isinstance(caption, str) or not caption.strip():
                    report.skip(f"annotation {name}", "has no caption text")
                    continue
                id, meta = report.unique_id(name), {"image_id": image_id}
                if conversations:
                    sample = conversation(Image(file), question, answer=caption.strip(), id=id)
                    yield Sample(id, sample.messages, meta=meta)
                else:
                    yield Sample(id, views={"image": Image(file), "text": Text(caption.strip())}, meta=meta)

    return finish(report, src, out, samples())


def import_coco_instances(
    src: PathLike,
    out: PathLike,
    *,
    images: PathLike | None = None,
    conversations: bool = False,
    question: str = "Which objects are in the image?",
) -> ImportReport:
    """Import boxes: one sample an image.

    ``label`` is the category that covers the largest area in all; ``meta.objects`` lists the categories by name,
    ``meta.counts`` how many of each there are (a box marked as a crowd counts once), ``meta.boxes`` each as
    ``[category, x, y, width, height]`` in pixels.

    Args:
        src: the annotation file.
        out: the JSON Lines file to write.
        images: the folder of the images; by default ``images`` beside ``src``, or its folder.
        conversations: write conversations instead, whose answer lists the objects.
        question: what the user says.

    Raises:
        DataError: if ``src`` is no instance file, or nothing could be imported.
    """
    path = Path(src)
    data = read_json(path)
    report = ImportReport()
    categories = {item.get("id"): str(item.get("name")) for item in objects(data, "categories", path)}
    files = _Images(objects(data, "images", path), image_folder(path, images), report)
    found = _by_image(objects(data, "annotations", path), files, report)

    def samples() -> Iterator[Sample]:
        for image_id, file, items in files.with_annotations(found, "box"):
            boxes = [box for item in items if (box := _box(item, categories, report)) is not None]
            if not boxes:
                report.skip(file.name, "has no usable box")
                continue
            id, meta = report.unique_id(str(image_id)), _objects(boxes) | {"image_id": image_id}
            label = _largest(boxes)
            if conversations:
                answer = ", ".join(meta["objects"])
                sample = conversation(Image(file), question, answer=answer, id=id)
                yield Sample(id, sample.messages, label=label, meta=meta)
            else:
                yield Sample(id, views={"image": Image(file)}, label=label, meta=meta)

    return finish(report, src, out, samples())


class _Images:
    """The images of an annotation file that are there; the others are reported."""

    def __init__(self, entries: list[dict[str, Any]], root: Path, report: ImportReport) -> None:
        self._report = report
        self._files: dict[Any, Path] = {}
        self._absent: set[Any] = set()
        for entry in entries:
            name, id = entry.get("file_name"), entry.get("id")
            if not isinstance(name, str) or not isinstance(id, int | str):
                report.skip(f"image {id}", "has no file_name and id")
            elif problem := problem_with(file := media_file(root, name)):
                report.skip(name, problem)
                self._absent.add(id)
            else:
                self._files[id] = file

    def knows(self, id: Any) -> bool:
        return id in self._files or id in self._absent

    def with_annotations(
        self, found: dict[Any, list[dict[str, Any]]], kind: str
    ) -> Iterator[tuple[Any, Path, list[dict[str, Any]]]]:
        for id, file in self._files.items():
            if id in found:
                yield id, file, found[id]
            else:
                self._report.skip(file.name, f"has no {kind}")


def _by_image(
    annotations: list[dict[str, Any]], files: _Images, report: ImportReport
) -> dict[Any, list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = {}
    for annotation in annotations:
        id = annotation.get("image_id")
        if isinstance(id, int | str) and files.knows(id):
            found.setdefault(id, []).append(annotation)
        else:
            report.skip(f"annotation {annotation.get('id')}", f"its image {id} is not in the list of images")
    return found


def _box(
    annotation: dict[str, Any], categories: dict[Any, str], report: ImportReport
) -> tuple[str, float, float, float, float] | None:
    name, box, category = f"annotation {annotation.get('id')}", annotation.get("bbox"), annotation.get("category_id")
    if not isinstance(category, int | str) or category not in categories:
        report.skip(name, f"its category {category} is not in the list of categories")
        return None
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(side, int | float) for side in box)
        or not (box[2] > 0 and box[3] > 0)
    ):
        report.skip(name, f"its bbox is {box!r:.60}; expected [x, y, width, height], width and height above 0")
        return None
    return categories[category], box[0], box[1], box[2], box[3]


def _objects(boxes: list[tuple[str, float, float, float, float]]) -> dict[str, Any]:
    names = sorted({box[0] for box in boxes})
    counts = {name: sum(box[0] == name for box in boxes) for name in names}
    return {"objects": names, "counts": counts, "boxes": [list(box) for box in boxes]}


def _largest(boxes: list[tuple[str, float, float, float, float]]) -> str:
    areas: dict[str, float] = {}
    for name, _, _, width, height in sorted(boxes):
        areas[name] = areas.get(name, 0.0) + width * height
    return max(areas, key=lambda name: areas[name])
