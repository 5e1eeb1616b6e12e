"""The house rules that no linter knows: file and function sizes, forbidden names, ASCII.

Usage: ``python scripts/house.py FOLDER...``; prints one line per broken rule and exits with 1 if there is any.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
FORBIDDEN_NAMES = frozenset(["util", "utils", "helper", "helpers", "common", "misc"])
SUFFIXES = frozenset((".py", ".yaml", ".yml", ".toml", ".html", ".sh", ""))


def broken_rules(folder: Path) -> Iterator[str]:
    """Every broken rule below ``folder``, as ``path:line: what was found, what is allowed``."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__pycache__")) or part.endswith(".egg-info") for part in path.parts)
        if hidden or not path.is_file() or path.suffix not in SUFFIXES:
            continue
        yield from _names(path, folder)
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from _ascii(path, text)
        lines = text.count("\n") + 1
        if path.suffix == ".py":
            if lines > MAX_FILE_LINES:
                yield f"{path}:1: {lines} lines, the limit is {MAX_FILE_LINES}; split it along its ideas"
            yield from _functions(path, text)


def _names(path: Path, folder: Path) -> Iterator[str]:
    for part in path.relative_to(folder).with_suffix("").parts:
        if part in FORBIDDEN_NAMES:
            yield f"{path}:1: the name {part!r} says nothing; name it after what it holds"


def _ascii(path: Path, text: str) -> Iterator[str]:
    if text.isascii():
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            found = next(char for char in line if not char.isascii())
            yield f"{path}:{number}: the non-ASCII character U+{ord(found):04X}; write ASCII or an escape"


def _functions(path: Path, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, the limit is {MAX_FUNCTION_LINES}"


def main(folders: list[str]) -> int:
    """Print the broken rules of all folders; the exit status."""
    problems = [problem for folder in folders for problem in broken_rules(Path(folder))]
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
