import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "apps", "recipes", "training", "evaluation", "retrieval", "inference", "safety", "models", "objectives", "data",
    "modalities", "core", "data/scenes", "models/layers", "models/encoders", "models/heads", "models/compose",
)  # fmt: skip


def house():
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "scripts" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "lint-imports"
    if not command.exists():
        pytest.skip("import-linter is not installed (pip install 'polymodal[dev]')")
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    return subprocess.run(
        [command, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_import_contract_holds():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory) -> Path:
    """The twelve packages, empty, under the real contract."""
    folder = tmp_path_factory.mktemp("skeleton")
    for package in (".", *PACKAGES):
        place = folder / "src" / "polymodal" / package
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").touch()
    shutil.copy(ROOT / ".importlinter", folder)
    return folder


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("core", "import polymodal.modalities", "Packages import downwards only BROKEN"),
        ("training", "import polymodal.evaluation", "Packages import downwards only BROKEN"),
        ("objectives", "import polymodal.data", "Packages import downwards only BROKEN"),
        ("models/layers", "import polymodal.models.heads", "Inside models, imports point downwards only BROKEN"),
        ("models/encoders", "import polymodal.models.heads", "Inside models, imports point downwards only BROKEN"),
        ("modalities", "import torch", "Core, modalities and safety do not know torch BROKEN"),
        ("apps", "import torch", "Apps never import torch themselves BROKEN"),
    ],
)
def test_contract_catches_an_injected_violation(skeleton, module, line, contract):
    file = skeleton / "src" / "polymodal" / module / "injected.py"
    file.write_text(f"{line}\n")
    try:
        result = lint_imports(skeleton)
    finally:
        file.unlink()
    assert result.returncode != 0
    assert contract in result.stdout
    assert "injected" in result.stdout


@pytest.mark.parametrize("module", ["chores", "models/chores"])
def test_contract_catches_a_package_outside_the_layers(skeleton, module):
    place = skeleton / "src" / "polymodal" / module
    place.mkdir()
    (place / "__init__.py").touch()
    try:
        result = lint_imports(skeleton)
    finally:
        shutil.rmtree(place)
    assert result.returncode != 0
    assert "chores" in result.stdout


def test_the_house_rules_hold():
    rules = house()
    folders = [ROOT / name for name in ("src", "tests", "scripts", "examples", "benchmarks") if (ROOT / name).exists()]
    assert [problem for folder in folders for problem in rules.broken_rules(folder)] == []


def test_the_house_rules_catch_each_fault(tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "fine.py").write_text("x = 1\n")
    (tmp_path / "helpers.py").write_text("x = 1\n")
    (tmp_path / "long.py").write_text("x = 1\n" * 601)
    (tmp_path / "function.py").write_text("def f():\n" + "    x = 1\n" * 80)
    (tmp_path / "accent.py").write_text('x = 1\ny = "caf\u00e9"\n', encoding="utf-8")
    (tmp_path / "good.py").write_text("def f():\n" + "    x = 1\n" * 79)
    found = "\n".join(house().broken_rules(tmp_path))
    assert len(found.splitlines()) == 5, found
    for message in (
        "fine.py:1: the name 'utils'",
        "helpers.py:1: the name 'helpers'",
        "long.py:1: 602 lines, the limit is 600",
        "function.py:1: f has 81 lines, the limit is 80",
        "accent.py:2: the non-ASCII character U+00E9",
    ):
        assert message in found


def run_python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_importing_the_package_has_no_effect(tmp_path):
    code = (
        "import os, sys, threading, warnings, logging\n"
        "before = (dict(os.environ), os.getcwd(), threading.active_count(), list(warnings.filters), "
        "list(logging.getLogger().handlers), list(sys.path))\n"
        "import polymodal\n"
        "after = (dict(os.environ), os.getcwd(), threading.active_count(), list(warnings.filters), "
        "list(logging.getLogger().handlers), list(sys.path))\n"
        "assert before == after\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = run_python(code, folder=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_torch(tmp_path):
    pytest.importorskip("polymodal.apps.cli")
    code = (
        "import sys\n"
        "from polymodal.apps.cli import main\n"
        "sys.argv = ['polymodal', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "for heavy in ('torch', 'transformers', 'sklearn', 'pyarrow'):\n"
        "    assert heavy not in sys.modules, heavy\n"
    )
    result = run_python(code, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "quickstart" in result.stdout


@pytest.mark.parametrize("module", ["core.samples", "safety.checks", "retrieval.index", "evaluation.metrics"])
def test_torch_free_modules(module, tmp_path):
    result = run_python(f"import sys, polymodal.{module}\nassert 'torch' not in sys.modules", folder=tmp_path)
    assert result.returncode == 0, result.stderr


def test_every_script_is_executable_and_fails_on_error():
    for path in (*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"):
        if path.is_file() and path.suffix == "":
            assert os.access(path, os.X_OK), path
            assert path.read_text().startswith("#!/usr/bin/env bash\n"), path
            assert "\nset -" in path.read_text(), path
