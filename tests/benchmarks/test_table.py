import json

import pytest
from benchmarks import table


def result(name, date, found, quick=False):
    goal = {"what": "speed", "wanted": ">= 2x", "found": found, "met": found >= 2}
    return {
        "name": name, "title": name.title(), "date": date, "command": f"python -m benchmarks.{name}", "threads": 1,
        "hardware": {"cores": 2}, "rounds": 3, "quick": quick, "goals": [goal], "notes": ["a note"],
        "tables": [{"title": "T", "columns": ["case", "rate"], "rows": [["a", "1"]]}],
    }  # fmt: skip


def test_newest_takes_the_last_date_and_no_quick_run(tmp_path):
    for data in (
        result("loader", "2026-11-20", 1),
        result("loader", "2026-11-22", 3),
        result("start", "2026-11-22", 9, True),
    ):
        (tmp_path / f"{data['name']}-{data['date']}.json").write_text(json.dumps(data))
    found = table.newest(tmp_path)
    assert list(found) == ["loader"] and found["loader"]["date"] == "2026-11-22"


def test_every_figure_comes_from_the_results():
    text = table.markdown({"loader": result("loader", "2026-11-22", 1.25)})
    assert "| loader | speed | >= 2x | 1.25 | no |" in text
    assert "| a | 1 |" in text and "- a note" in text and "cores 2" in text
    assert "Not measured yet: packing" in text


def test_only_what_stands_between_the_marks_is_replaced():
    page = f"head\n{table.BEGIN}\nold\n{table.END}\ntail\n"
    assert table.written(page, "new") == f"head\n{table.BEGIN}\n\nnew\n{table.END}\ntail\n"
    with pytest.raises(ValueError, match="expected both marks"):
        table.written("no marks", "new")


def test_the_page_is_up_to_date():
    assert table.main(["--check"]) == 0, "run: python -m benchmarks.table"
