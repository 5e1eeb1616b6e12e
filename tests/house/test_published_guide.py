"""What the guide to published models says works: its Python, its recipes and its commands run on small checkpoints."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import published_parts
import pytest

from polymodal.apps import cli
from polymodal.models.presets import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "published-models.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_all_that_the_page_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r"checkpoints/(\w+)", TEXT)):
        published_parts.write(name, tmp_path / "checkpoints" / name)
    published_parts.write_media(tmp_path / "data")
    shutil.copy("data/0.png", "photo.png")
    shutil.copy("data/0.wav", "beep.wav")
    names = re.findall(r"Save this as `(\w+\.yaml)`", TEXT)
    for name, block in zip(names, blocks("yaml"), strict=True):
        Path(name).write_text(block, encoding="utf-8")
    for block in blocks("python"):
        exec(compile(block, PAGE.name, "exec"), {})
    commands = [line[2:] for block in blocks("console") for line in block.splitlines()]
    assert len(commands) >= 7
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        try:
            cli.main()
        except SystemExit as leave:
            assert not leave.code, (command, capsys.readouterr())
    assert all((tmp_path / "runs" / name / "model.safetensors").is_file() for name in ("mix", "hears"))
    assert (tmp_path / "exported" / "llava" / "config.json").is_file()


def test_the_families_that_the_page_names_are_there() -> None:
    named = re.sub(r"[^a-z0-9]", "", TEXT.partition("They are encoders")[2].partition("What has no native")[0].lower())
    known = ["clip", "siglip", "dinov2", "whisper", "videomae", "i3d", "patchtst", "llava", "vilt", "flava", "t5"]
    assert all(name in ARCHITECTURES and name in named for name in known)
