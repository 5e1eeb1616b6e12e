"""Writes ``docs/reference/models.md``: every published architecture, its sizes and its parity with the reference.

Usage: ``python scripts/make_models.py [--measure | --figures FILE]``. With ``--measure`` the parity tests run first,
and what they compared is written to ``docs/reference/parity.json``; ``--figures`` takes the file that a run of all
tests with ``POLYMODAL_PARITY_FILE=FILE`` left; without either the stored figures are used. Parameters are counted
on models without memory. A test compares the page in the repository with what this writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from polymodal.models.compose import MultimodalModel
from polymodal.models.presets import ARCHITECTURES, Architecture, Size
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "reference" / "models.md"
PARITY = ROOT / "docs" / "reference" / "parity.json"
TESTS = "tests/models/presets"

_HEAD = """# Published architectures

Written by `python scripts/make_models.py --measure`; do not edit it by hand.

`pm.load(FOLDER)` reads a checkpoint folder of any of these, `polymodal presets show NAME` prints a published size as a
recipe, and `from: FOLDER` takes a part of it into another recipe.

- *parity*: the largest difference of outputs relative to the reference's largest value, over all comparisons of the
  architecture's tests, whose number stands in brackets (random small weights, float32; the bound is 1e-4, for
  preprocessing 1e-3). "equations" stands where no reference is on the package registry: those tests hold the paper's
  shapes and equations. ALBEF is compared with an assembly of the reference's parts (bound 2e-4).
- LoRA and the other adapters go onto any of them by pattern.
- *also by the library*: `{use: transformers}` is held to the reference for this `model_type` as well, as a backbone or
  as an encoder. The last table lists those that come in this way alone; others may, but no test holds them.
- *parameters*: of the published checkpoint, shared ones once; *built*: counted on the model that the preset builds.
  They differ where a tower's features are read before its last block (what comes after is not built, and an export
  copies it), and where a fixed table of positions is counted as a parameter (Whisper).
"""


def measure() -> dict[str, Any]:
    """Run the parity tests; per test module, how many comparisons there were and the worst of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parity.jsonl"
        environment = {**os.environ, "POLYMODAL_PARITY_FILE": str(file)}
        subprocess.run([sys.executable, "-m", "pytest", "-q", TESTS], cwd=ROOT, env=environment, check=True)
        return summary(file)


def summary(file: Path) -> dict[str, Any]:
    """Per test module, how many comparisons there were and the worst of them."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["test"].startswith(TESTS)]
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[Path(row["test"].split("::")[0]).stem.removeprefix("test_")].append(row["relative"])
    return {
        name: {"comparisons": len(values), "worst": float(f"{max(values):.1e}")}
        for name, values in sorted(found.items())
    }


def count(architecture: Architecture, size: Size) -> int:
    """Parameters of the model that a size's preset builds."""
    model = architecture.model(HubConfigs(size.config, size.preprocessor))
    rows = model.tokenizer.rows or 0
    with no_weights():
        return num_parameters(MultimodalModel(model, rows))


def by_the_library() -> dict[str, str]:
    """Each ``model_type`` that ``{use: transformers}`` is tested with, and what it is there: the tests' own tables."""
    spec = importlib.util.spec_from_file_location("adapter_references", ROOT / "tests" / "adapter_references.py")
    assert spec is not None and spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    towers = {kind: f"encoder ({modality})" for kind, (modality, *_) in cases.TOWERS.items()}
    return dict.fromkeys(cases.LANGUAGE, "backbone") | towers


def page(parity: dict[str, Any]) -> str:
    """The whole page."""
    library, native = by_the_library(), set()
    columns = "| architecture | reads `model_type` | source | parity | also by the library |"
    lines = [_HEAD, columns, "| --- | --- | --- | --- | --- |"]
    for architecture in ARCHITECTURES.values():
        module = architecture.to_model.__module__.rsplit(".", 1)[-1]
        found = parity.get(module)
        figure = "equations" if found is None else f"{found['worst']:.1e} ({found['comparisons']})"
        kinds = ", ".join(f"`{kind}`" for kind in architecture.model_types)
        both = ", ".join(library[kind] for kind in architecture.model_types if kind in library)
        native |= {*architecture.model_types}
        lines.append(f"| `{architecture.name}` | {kinds} | {architecture.source} | {figure} | {both or '-'} |")
    lines += ["", "| published size | architecture | parameters | built |", "| --- | --- | --- | --- |"]
    for architecture in ARCHITECTURES.values():
        for name, size in architecture.sizes.items():
            built = count(architecture, size)
            if built + size.unused != size.parameters:
                raise SystemExit(
                    f"{name}: {built:,} parameters built, {size.unused:,} unused, {size.parameters:,} published"
                )
            lines.append(f"| `{name}` | `{architecture.name}` | {size.parameters:,} | {built:,} |")
    lines += ["", "| by the library alone: `model_type` | as |", "| --- | --- |"]
    lines += [f"| `{kind}` | {role} |" for kind, role in sorted(library.items()) if kind not in native]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--measure", action="store_true")
    source.add_argument("--figures", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.measure or options.figures:
        figures = measure() if options.measure else summary(options.figures)
        PARITY.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    OUT.write_text(page(json.loads(PARITY.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
