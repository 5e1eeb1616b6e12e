import contextlib
import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import make_data, make_run

from polymodal.apps import talk
from polymodal.core.errors import ConfigError, UnsupportedMediaError
from polymodal.core.parts import Audio, Image, Points, Text
from polymodal.core.samples import Message
from polymodal.recipes.model import Model
from polymodal.recipes.stored_models import load

SHORT = {"max_new_tokens": 4, "temperature": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus in ``data`` and a run with random weights in ``run``."""
    folder = tmp_path_factory.mktemp("talk")
    make_run(folder / "run", make_data(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def model(place) -> Model:
    return load(place / "run")


@pytest.fixture
def media(place) -> dict[str, Path]:
    folder = place / "data" / "val" / "media"
    return {kind.name: sorted(kind.iterdir())[0] for kind in folder.iterdir()}


def test_parts_are_read_from_arguments(media, tmp_path, monkeypatch):
    image = talk.parse_part(str(media["image"]))
    assert isinstance(image, Image) and image.path == media["image"]
    assert isinstance(talk.parse_part(f"audio:{media['audio']}"), Audio)
    np.save(tmp_path / "cloud.npy", np.zeros((4, 3), np.float32))
    assert isinstance(talk.parse_part(f"points:{tmp_path / 'cloud.npy'}"), Points)
    with pytest.raises(UnsupportedMediaError, match=r"Say which one it is, as in points:cloud.npy"):
        talk.parse_part(str(tmp_path / "cloud.npy"))
    (tmp_path / "note.txt").write_text("read me", encoding="utf-8")
    note = talk.parse_part(str(tmp_path / "note.txt"))
    assert isinstance(note, Text) and note.text == "read me"


@pytest.mark.parametrize("text", ["What is it?", "Is it red.", "a red car", "12:30", "e.g. this one", "x" * 5000, ""])
def test_other_arguments_are_text(text):
    part = talk.parse_part(text)
    assert isinstance(part, Text) and part.text == text


def test_text_may_be_said_to_be_text():
    part = talk.parse_part("text:photo.png")
    assert isinstance(part, Text) and part.text == "photo.png"


@pytest.mark.parametrize("text", ["photo.png", "my photo.jpg", "folder/sound.wav", "model.bin"])
def test_a_file_that_is_not_there_is_an_error(text):
    with pytest.raises(ConfigError, match=f"{text}: no such file; write text:{text} if it is meant as text"):
        talk.parse_part(text)


def test_a_named_file_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"points:none.npy: no such file: none.npy; expected modality:path"):
        talk.parse_part("points:none.npy")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("https://host/photo.png", "nothing is fetched from the net; download it and name the file"),
        ("{folder}", "is a folder, expected a file; write text:"),
    ],
)
def test_what_is_no_file_is_not_taken_for_a_question(form, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        talk.parse_part(form.format(folder=tmp_path))


def test_ask_prints_the_answer(place, media, model, capsys):
    talk.ask(place / "run", [str(media["image"]), "What is it?"], SHORT, None, None, as_json=False)
    said = capsys.readouterr().out
    assert said == model.chat(Image(media["image"]), "What is it?", **SHORT).text + "\n"


def test_ask_as_json_has_the_answer_and_its_counts(place, media, capsys):
    talk.ask(place / "run", [str(media["audio"]), str(media["image"]), "And?"], SHORT, None, None, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data.keys() == {"text", "finish", "tokens", "prompt_tokens", "reused_tokens", "seconds", "choices"}
    assert data["finish"] in ("stop", "length") and data["tokens"] <= 4
    assert data["prompt_tokens"] > 8 and data["seconds"] > 0


def test_ask_needs_a_question(media):
    with pytest.raises(ConfigError, match="found only files, expected a question after them"):
        talk.ask(Path("nowhere"), [str(media["image"])], SHORT, None, None, as_json=False)


def test_an_empty_question_is_none(media):
    with pytest.raises(ConfigError, match=r"found an empty question: polymodal ask MODEL photo.png"):
        talk.ask(Path("nowhere"), [str(media["image"]), " "], SHORT, None, None, as_json=False)


def test_a_device_that_is_none_is_refused(place, media):
    with pytest.raises(ConfigError, match="device: Input should be 'auto', 'cpu' or 'cuda'; found 'gpu'"):
        talk.ask(place / "run", [str(media["image"]), "What?"], SHORT, "gpu", None, as_json=False)


def test_a_model_that_does_not_answer_refuses_to_chat(place, model, monkeypatch):
    monkeypatch.setattr(model.engine.processor, "chat", None)
    monkeypatch.setattr(talk, "load", lambda *_: model)
    with pytest.raises(ConfigError, match="this model has no decoder: it embeds and compares"):
        talk.chat(place / "run", SHORT, None)


def test_embed_writes_unit_vectors(place, media, tmp_path, capsys):
    inputs = [str(media["image"]), str(media["sensor"]), "a red cube"]
    talk.embed(place / "run", inputs, tmp_path / "new" / "vectors.npy", None, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["inputs"] == inputs and data["dim"] == 8 and data["vectors"] is None
    vectors = np.load(tmp_path / "new" / "vectors.npy")
    assert vectors.shape == (3, 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    talk.embed(place / "run", inputs, None, None, as_json=False)
    table = capsys.readouterr().out
    assert "cosine similarity" in table and table.count("1.000") == 3


def test_a_conversation_remembers_turns_and_media(model, media, capsys):
    chat = talk.Conversation(model, talk.Sampling.parse(SHORT))
    chat.take(f"/image {media['image']}")
    assert [part.modality for part in chat.pending] == ["image"]
    chat.take("What is it?")
    assert not chat.pending and [message.role for message in chat.history] == ["user", "assistant"]
    said = capsys.readouterr().out.rstrip("\n")
    assert chat.history[1].text == said
    chat.take("And now?")
    second = capsys.readouterr().out.rstrip("\n")
    history = [Message("user", (Image(media["image"]), Text("What is it?"))), Message("assistant", (Text(said),))]
    assert second == model.chat("And now?", history=history, **SHORT).text
    chat.take("/reset")
    assert not chat.history
    chat.take("")
    assert not chat.history


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imag a.png", r"unknown command '/imag'; did you mean '/image'\?"),
        ("/image none.png", "/image: no such file: none.png; expected /image PATH"),
        ("/image", r"/image: no such file: \(nothing\)"),
    ],
)
def test_wrong_commands_are_explained(model, line, message):
    with pytest.raises(ConfigError, match=message):
        talk.Conversation(model, talk.Sampling()).take(line)


def test_a_conversation_that_is_too_long_says_what_to_do(model, capsys):
    chat = talk.Conversation(model, talk.Sampling.parse(SHORT))
    chat.take("Hello?")
    with pytest.raises(ConfigError, match=r"max_tokens is 512.*/reset forgets the conversation"):
        chat.take("word " * 600)
    assert len(chat.history) == 2


def test_a_conversation_keeps_its_budget_of_media_tokens(model, media):
    chat = talk.Conversation(model, talk.Sampling.parse(SHORT), tokens=1)
    chat.pending += [Image(media["image"]), Image(media["image"])]
    with pytest.raises(ConfigError, match="media"):
        chat.take("What are they?")


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(capsys):
    def pieces():
        yield "so "
        yield "far"
        raise KeyboardInterrupt

    assert talk._print_pieces(pieces()) == "so far"
    assert capsys.readouterr().out == "so far\n"


def test_chat_reads_standard_input(place, media, monkeypatch, capsys):
    lines = ["/help", f"/image '{media['image']}'", "What is it?", "/nonsense", "[bold]And?", "/quit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    talk.chat(place / "run", SHORT, None)
    said = capsys.readouterr().out
    assert "tiny: takes text, image, audio, video, points, sensor." in said
    assert "add media to the next message" in said
    assert "error: unknown command '/nonsense'" in said
    assert said.count("> ") == 6


@pytest.mark.slow
def test_chat_in_a_terminal(place, media):
    pty = pytest.importorskip("pty")
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "polymodal", "chat", str(place / "run"), "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
    os.close(terminal)
    os.write(main, f"/image {media['image']}\nWhat is it?\n/quit\n".encode())
    seen = b""
    # A read fails once the program has ended and so closed the terminal's other side.
    with contextlib.suppress(OSError):
        while select.select([main], [], [], 60)[0]:
            seen += os.read(main, 4096)
    os.close(main)
    assert process.wait(timeout=10) == 0, seen.decode()
    assert b"/help lists the commands" in seen and b"error" not in seen
