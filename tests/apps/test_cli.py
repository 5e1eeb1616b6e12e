import importlib
import json
import subprocess
import sys
import time
from inspect import signature

import pytest
import yaml
from typer.main import get_command

import polymodal
from polymodal.apps import cli
from polymodal.core.errors import ConfigError


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["polymodal", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as leave:
        status = int(leave.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_help_loads_neither_torch_nor_numpy():
    code = "import sys; from polymodal.apps.cli import app; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert python(code).strip() == "[]"


def test_help_is_fast():
    best = min(_seconds([sys.executable, "-m", "polymodal", "--help"]) for _ in range(3))
    bare = min(_seconds([sys.executable, "-c", "pass"]) for _ in range(3))
    # 0.3 s on an idle machine; what the interpreter itself takes shows how busy this one is.
    assert best < max(0.3, 12 * bare)


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    return time.perf_counter() - started


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"polymodal {polymodal.__version__}\n", "")


def commands():
    group = get_command(cli.app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from ([(name, sub) for sub in inner] if inner else [(name,)])


def parameters(words):
    """The parameters of a command by name."""
    command = get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {parameter.name: parameter for parameter in command.params}


WRITERS = [("ask",), ("chat",), ("data", "capfilt")]
"""Commands whose model writes text."""
USERS = [*WRITERS, ("embed",), ("evaluate",)]
"""Commands that run a model; ``export`` only rewrites its files."""


def test_commands_alike_have_the_same_options():
    found = {words: parameters(words) for words in commands()}
    has = {name: [words for words in found if name in found[words]] for name in ("json", "device", "overrides")}
    # A conversation is for people.
    assert has["json"] == [words for words in found if words != ("chat",)]
    assert set(has["device"]) == set(USERS)
    assert set(has["overrides"]) == {("quickstart",), ("check",), ("train",)}
    for name in ("max_new_tokens", "temperature", "top_p", "seed"):
        texts = {found[words][name].help for words in WRITERS}
        assert len(texts) == 1 and {words for words in found if name in found[words]} == set(WRITERS)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_says_what_is_needed_and_what_happens_without_an_option(words):
    for parameter in parameters(words).values():
        if parameter.param_type_name == "argument":
            assert parameter.metavar and parameter.metavar.isupper(), parameter.name
        is_open = parameter.default is None and not parameter.required and parameter.param_type_name == "option"
        assert parameter.help and (not is_open or "if not given" in parameter.help), parameter.name


def test_the_request_of_a_captioner_is_the_librarys():
    from polymodal.recipes.model import CAPTION_REQUEST

    assert parameters(("data", "capfilt"))["request"].default == CAPTION_REQUEST


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_has_help(words, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, *words, "--help")
    assert status == 0 and "Usage: " in out


def test_every_command_has_its_function(monkeypatch):
    """What a command names must be there and take what it is given; found by calling each with nothing behind it."""
    named: list[str] = []
    given: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setattr(
        cli, "_command", lambda name: named.append(name) or (lambda *args, **options: given.append((args, options)))
    )
    examples = {
        ("quickstart",): [], ("ask",): ["run", "Why?"], ("chat",): ["run"], ("embed",): ["run", "a"],
        ("check",): ["quickstart"], ("train",): ["quickstart"], ("evaluate",): ["run", "a.jsonl"],
        ("data", "make"): ["scenes", "out"], ("data", "import"): ["csv", "a", "b"], ("data", "inspect"): ["a"],
        ("data", "capfilt"): ["a", "b", "--filter", "run"], ("export",): ["run", "--out", "a"],
        ("presets", "list"): [], ("presets", "show"): ["quickstart"],
    }  # fmt: skip
    assert set(examples) == set(commands())
    for words, arguments in examples.items():
        cli.app([*words, *arguments], standalone_mode=False)
    assert len(named) == len(examples)
    for name, (args, options) in zip(named, given, strict=True):
        module, _, function = name.partition(":")
        signature(getattr(importlib.import_module(f"polymodal.apps.{module}"), function)).bind(*args, **options)


def test_the_layout_of_an_adapter_cannot_be_chosen(monkeypatch, capsys):
    options = ("--out", "a", "--format", "adapter", "--architecture", "llama")
    status, _, err = run(monkeypatch, capsys, "export", "run", *options)
    assert status == 2 and "--architecture" in err and "has no layouts" in err


def test_an_error_that_the_user_can_mend_is_one_line(monkeypatch, capsys, tmp_path):
    status, out, err = run(monkeypatch, capsys, "ask", str(tmp_path), "Why?")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {tmp_path}: is not a run folder") and err.count("\n") == 1


def test_a_file_system_error_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    status, _, err = run(monkeypatch, capsys, "data", "make", "scenes", str(tmp_path / "file" / "out"), "num_train=1")
    assert status == 2 and err.startswith("error: ") and "Not a directory" in err
    assert "Errno" not in err and str(tmp_path / "file") in err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def stopped(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_command", stopped)
    status, _, err = run(monkeypatch, capsys, "presets", "list")
    assert status == 130 and "Traceback" not in err


def test_options_reach_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_command", lambda name: lambda *args, **options: seen.append((args, options)))
    cli.app(["quickstart", "--preset", "scenes-full", "seed=3", "--scenes", "3,2,1", "--json"], standalone_mode=False)
    (out, overrides, preset, scenes), options = seen[0]
    assert (str(out), overrides, preset, scenes) == ("runs/scenes-full", ["seed=3"], "scenes-full", "3,2,1")
    assert options == {"as_json": True}


def test_json_goes_to_standard_output_alone(monkeypatch, capsys, tmp_path):
    arguments = ["data", "make", "scenes", str(tmp_path), "num_train=1", "num_val=1", "num_novel=0", "--json"]
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 0 and err == ""
    assert json.loads(out)["scenes"] == {"train": 1, "val": 1, "novel": 0}


def test_a_preset_is_printed_as_it_was_written_or_as_data(monkeypatch, capsys):
    _, text, _ = run(monkeypatch, capsys, "presets", "show", "quickstart")
    _, data, _ = run(monkeypatch, capsys, "presets", "show", "quickstart", "--json")
    assert text.startswith("#") and json.loads(data) == yaml.safe_load(text)


def test_errors_are_raised_where_python_calls(tmp_path):
    with pytest.raises(ConfigError):
        importlib.import_module("polymodal.apps.corpora").make("scene", tmp_path, [], as_json=True)
