"""Importers: other people's layouts -> one JSON Lines file of samples, with a report of all that was left out."""

from collections.abc import Callable

from polymodal.data.importers.coco import import_coco_captions, import_coco_instances
from polymodal.data.importers.folders import import_folder
from polymodal.data.importers.llava import import_llava
from polymodal.data.importers.pairs import import_pairs
from polymodal.data.importers.report import ImportReport

IMPORTERS: dict[str, Callable[..., ImportReport]] = {
    "llava": import_llava,
    "coco-captions": import_coco_captions,
    "coco-instances": import_coco_instances,
    "folder": import_folder,
    "csv": import_pairs,
}
"""Importers by the name that ``polymodal data import`` takes: ``importer(src, out, **options) -> ImportReport``."""

__all__ = [
    "IMPORTERS",
    "ImportReport",
    "import_coco_captions",
    "import_coco_instances",
    "import_folder",
    "import_llava",
    "import_pairs",
]
