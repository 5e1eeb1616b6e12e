"""The loader against its floor: the same JPEG files read, decoded and fitted in a bare loop.

CPU efficiency is the floor's processor time per sample over the loader's: what planning, shuffling, threads and joining
add. Files are in the page cache for both. Every case is a first epoch: no file was met before under its name.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from benchmarks import harness, shapes
from polymodal.core.limits import Limits
from polymodal.core.parts import Image
from polymodal.core.samples import Sample
from polymodal.data.loader import BatchSpec, ListSource, Loader
from polymodal.modalities.image import ImageReaderConfig, header
from polymodal.modalities.image.resize import fit_to_canvas
from polymodal.modalities.processor import Processor, StreamLayout
from polymodal.modalities.table import build_reader

FLOOR, READER = "bare loop: decode and fit", "bare loop: our reader"


def bare(paths: Sequence[Path], size_px: int) -> np.ndarray:
    """The floor: decode, resize, normalise, and nothing else."""
    result = np.zeros((0, 3, size_px, size_px), np.float32)
    for start in range(0, len(paths), 16):
        pictures = [simplejpeg.decode_jpeg(path.read_bytes(), colorspace="RGB") for path in paths[start : start + 16]]
        fitted = [fit_to_canvas(one, (size_px, size_px), "stretch", (0.5,) * 3, (0.5,) * 3) for one in pictures]
        result = np.stack(fitted)
    return result


def linked(paths: Sequence[Path], times: int, folder: Path) -> list[Path]:
    """Each file under so many names: more files than there are, none of which the loader has met."""
    names = [folder / f"{turn}-{path.name}" for turn in range(times) for path in paths]
    for name, path in zip(names, [*paths] * times, strict=True):
        name.symlink_to(path.resolve())
    return names


def run(options: harness.Options) -> harness.Result:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        photos = shapes.photos()[: 8 if options.quick else 80]
        return measure(linked(photos, 1 if options.quick else 4, Path(folder)), options.repeat)


def measure(paths: Sequence[Path], repeat: int) -> harness.Result:
    """Measure on these files."""
    size_px, tokenizer = 224, shapes.tokenizer(400)
    reader = build_reader(ImageReaderConfig(size_px=size_px), Limits(), tokenizer)
    processor = Processor(tokenizer, None, {"image": StreamLayout(reader, False, lambda _: 1)}, max_tokens=1)
    source = ListSource([Sample(str(index), views={"image": Image(path)}) for index, path in enumerate(paths)])

    def floor() -> float:
        bare(paths, size_px)
        return float(len(paths))

    def read() -> float:
        header._header_of_file.cache_clear()
        for path in paths:
            reader.read(Image(path))
        return float(len(paths))

    def load(threads: int) -> float:
        header._header_of_file.cache_clear()
        with Loader([source], None, processor, BatchSpec(samples=16), threads=threads, seed=1, once=True) as loader:
            return float(sum(batch.num_samples for batch in loader))

    cases = {FLOOR: floor, READER: read}
    names = {threads: f"loader, {threads} decoding thread{'s' * (threads > 1)}" for threads in (1, 2)}
    cases |= {name: functools.partial(load, threads) for threads, name in names.items()}
    rows = harness.interleave(cases, repeat)
    result = harness.Result("loader", "Loading photographs against the decode floor")
    mean_kb = np.mean([path.stat().st_size for path in paths]) / 1e3
    title = f"{len(paths)} JPEG files ({mean_kb:.0f} kB mean) to {size_px} px"
    result.add_rows(title, rows, "samples/s", FLOOR)
    for name in names.values():
        result.add_goal(f"CPU efficiency, {name}", 0.95, harness.cpu_ratio(rows, name, FLOOR))
    result.notes.append(
        "the column 'ratio by CPU time' is the CPU efficiency; the floor has no checks, limits or errors"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = harness.parse_options(__doc__, argv, repeat=5)
    run(options).finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
