"""The page of published architectures is what the tables and the stored figures say."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_is_current():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "scripts" / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    parity = json.loads((ROOT / "docs" / "reference" / "parity.json").read_text(encoding="utf-8"))
    assert written == module.page(parity), "run: python scripts/make_models.py"
