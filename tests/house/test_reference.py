"""The reference of recipes is what the config classes say."""

import importlib.util
from pathlib import Path

import pytest

from polymodal.core.limits import Limits
from polymodal.models.encoders.table import ENCODERS
from polymodal.recipes.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


def script():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return script().reference()


def test_reference_is_current(page):
    written = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    assert written == page, "run: python scripts/make_reference.py"


def test_reference_names_every_key_with_its_meaning(page):
    for name in (*Recipe.model_fields, *Limits.model_fields):
        assert f"| `{name}` |" in page, name
    for name in ENCODERS:
        assert f"### encoder `{name}`" in page
    assert "| `image_pixels` | whole number | 100,000,000 | Width x height of one image, from the header" in page
    assert "| `rank` | whole number | 16 | inner width of the update" in page
    assert "[lo ra]" not in page and "mapping of names, each to one of [head](#table-head)" in page
