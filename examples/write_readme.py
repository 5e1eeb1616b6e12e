"""Write the tables of ``README.md`` from the scores that the examples left with ``--json``.

python examples/write_readme.py           # reads examples/results/*.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
ORDER = ("hub", "missing", "interaction", "reliability", "ambiguity", "continual", "bootstrapping")


def section(result: dict[str, Any]) -> str:
    """One example's table in Markdown."""
    seconds = result["seconds"]
    lines = [
        f"### {result['title']}",
        "",
        f"`python examples/{result['example']}.py --json examples/results/{result['example']}.json`: "
        f"{result['seeds']} seeds, {seconds['cpu']:.0f} CPU seconds.",
        "",
        "| what | mean | range |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {row['what']} | {row['mean']:.3f} | {row['min']:.3f} - {row['max']:.3f} |" for row in result["rows"]]
    lines += ["", *(f"- {'holds' if claim['holds'] else '**fails**'}: {claim['claim']}" for claim in result["claims"])]
    return "\n".join(lines)


def tables() -> str:
    """The tables of every example that has results, in the README's order."""
    files = [HERE / "results" / f"{name}.json" for name in ORDER]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.is_file()]
    return "\n\n".join(section(result) for result in found)


def main() -> None:
    """Replace what stands between the marks in the README."""
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
