"""What the README says works: its recipe is proved, its commands and its Python blocks run."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_data, make_run

from polymodal.apps import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with all that the README speaks of: a quickstart run (random weights), a photo, a sound, a scan."""
    folder = tmp_path_factory.mktemp("readme")
    quick = folder / "runs" / "quickstart"
    media = make_data(quick / "data") / "val" / "media"
    make_run(quick / "run", quick / "data")
    shutil.copy(media / "image" / "000000.png", folder / "photo.png")
    shutil.copy(media / "audio" / "000000.wav", folder / "beep.wav")
    shutil.copy(media / "points" / "000000.ply", folder / "scan.ply")
    (folder / "sounds.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return folder


def run(command: str, capsys, monkeypatch) -> str:
    words = shlex.split(command)
    assert words[0] == "polymodal"
    if words[1] == "train":
        stages = yaml.safe_load(blocks("yaml")[0])["stages"]
        words += [f"stages.{stage['name']}.steps=1" for stage in stages]
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as leave:
        assert not leave.code, (command, capsys.readouterr())
    return capsys.readouterr().out


@pytest.mark.slow
def test_commands_run(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    said = {command: run(command, capsys, monkeypatch) for command in commands()}
    assert len(said) >= 8
    check = next(out for command, out in said.items() if " check " in command)
    assert "proofs hold" in check and "packing leaks nothing" in check
    asked = next(out for command, out in said.items() if "--json" in command)
    assert {"text", "finish", "prompt_tokens"} <= json.loads(asked).keys()
    assert (place / "runs" / "sounds" / "model.safetensors").is_file()


def test_python_blocks_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for block in blocks("python"):
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["vectors"].shape == (3, 8)
        assert names["logits"].ndim == 2
    assert capsys.readouterr().out


def test_ask_lines_of_the_first_screen_name_files_that_a_quickstart_makes(place):
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("polymodal ")]
    assert len(lines) == 2
    files = [word for line in lines for word in shlex.split(line) if word.startswith("runs/")]
    assert len(files) == 3 and all((place / file).exists() for file in files)


def test_data_lines_are_samples(tmp_path):
    from polymodal.core.samples import sample_from_json

    lines = blocks("json")[0].splitlines()
    kinds = [bool(sample_from_json(json.loads(line), tmp_path, "x").messages) for line in lines]
    assert kinds == [True, False]


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_command_stands_in_the_table():
    from typer.main import get_command

    table = README.partition("## Commands")[2]
    for name, command in get_command(cli.app).commands.items():
        assert f"polymodal {name}" in table, name
        for inner in getattr(command, "commands", {}):
            assert f"`{inner}`" in table or f"polymodal {name} {inner}" in table, (name, inner)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_packages_of_the_source_tree_are_all_described():
    tree = README.partition("## Where things are")[2]
    packages = [path.parent.name for path in (ROOT / "src" / "polymodal").glob("*/__init__.py")]
    assert len(packages) == 12
    assert all(f"  {name}/ " in tree for name in packages)
