from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hostile


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The verdict on every file, from one process that has to survive them all."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, hostile.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line.partition("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the process died ({done.returncode}) at {lines[-1:]}\n{done.stderr[-2000:]}"
    return {name: json.loads(record) for name, _, record in lines}


def test_corpus_is_large_and_covers_every_modality(findings: dict[str, dict]) -> None:
    assert len(findings) >= 200
    assert {record["modality"] for record in findings.values()} == {"image", "audio", "video", "points", "sensor"}


def test_every_file_is_read_as_promised_or_refused_by_name(findings: dict[str, dict]) -> None:
    wrong = {name: record["found"] for name, record in findings.items() if record["found"] not in ("read", "refused")}
    assert not wrong


def test_what_cannot_be_read_is_refused(findings: dict[str, dict]) -> None:
    accepted = [name for name, record in findings.items() if record["must_fail"] and record["found"] == "read"]
    assert not accepted


def test_time_and_memory_stay_bounded(findings: dict[str, dict]) -> None:
    slow = {name: record["seconds"] for name, record in findings.items() if record["seconds"] > 5}
    assert not slow
    assert max(record["peak_mib"] for record in findings.values()) < 1500


@pytest.mark.parametrize("index", range(len(hostile.ALL_WRITERS)))
def test_the_undamaged_seed_is_read(index: int, tmp_path: Path) -> None:
    modality, extension, writer = hostile.ALL_WRITERS[index]
    path = tmp_path / f"seed{extension}"
    path.write_bytes(writer())
    assert hostile.verdict(hostile.readers()[modality], modality, path) == "read"


def test_the_corpus_is_the_same_every_time() -> None:
    first, second = ([(f.name, f.data) for f in hostile.corpus(hostile.MEDIA_WRITERS)] for _ in range(2))
    assert [name for name, _ in first] == [name for name, _ in second]
    assert first == second
