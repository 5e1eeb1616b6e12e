"""Checkpoints: whole or not there, whatever breaks while they are written; loading to the bit and by exact name."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.training.checkpoints import (
    Keep,
    best,
    latest,
    load_checkpoint,
    load_weights,
    save_base,
    save_checkpoint,
)
from polymodal.training.optimizers import OPTIMIZERS
from polymodal.training.state_files import (
    join_state,
    random_state,
    read_tensors,
    set_random_state,
    split_state,
    write_tensors,
)


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((3, 2), float(step)), "a.bias": torch.arange(3.0) * step}


def save(folder: Path, step: int, **more) -> Path:
    return save_checkpoint(folder, weights(step), {"step": step, "m": torch.full((2,), float(step))}, step, **more)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def assert_holds(folder: Path, step: int) -> None:
    found = latest(folder)
    assert found is not None and found.step == step
    loaded = load_checkpoint(found.path)
    assert loaded.state["step"] == step and torch.equal(loaded.state["m"], torch.full((2,), float(step)))
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in weights(step).items())


def test_save_and_load(tmp_path):
    path = save(tmp_path / "run", 123, metric=0.5)
    assert path.name == "step-00000123"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "state.json",
        "state.safetensors",
        "weights.safetensors",
    ]
    assert_holds(tmp_path / "run", 123)
    assert latest(tmp_path / "run").metric == 0.5
    assert latest(tmp_path / "nothing") is None and best(tmp_path / "nothing", "min") is None


def test_the_weights_file_is_plain_safetensors(tmp_path):
    found = safetensors.torch.load_file(save(tmp_path, 1) / "weights.safetensors")
    assert set(found) == {"a.weight", "a.bias"}


def test_keep_last_and_best(tmp_path):
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0), (5, float("nan")), (6, None)):
        save(tmp_path, step, metric=metric, keep=Keep(last=2, best="min"))
    assert steps(tmp_path) == [4, 5, 6], "the newest of equally good ones stays"
    assert best(tmp_path, "min").step == 4
    save(tmp_path, 7, metric=9.0, keep=Keep(last=1, best="max"))
    assert steps(tmp_path) == [7]
    save(tmp_path, 8, metric=1.0, keep=Keep(last=1, best="max"))
    assert steps(tmp_path) == [7, 8] and best(tmp_path, "max").step == 7
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 11]
    with pytest.raises(ConfigError, match="last: Input should be greater than or equal to 1"):
        Keep.parse({"last": 0})


def test_a_damaged_best_gives_way_to_the_next(tmp_path):
    for step, metric in ((1, 1.0), (2, 2.0)):
        save(tmp_path, step, metric=metric)
    (tmp_path / "step-00000001" / "state.json").unlink()
    assert best(tmp_path, "min").step == 2


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, weights(9), {"step": 9}, 5)
    assert steps(tmp_path) == [5] and load_checkpoint(latest(tmp_path).path).state == {"step": 9}
    assert not list(tmp_path.glob(".*"))


# --- kills and refusals at every operation -------------------------------------------------------------------------


class Fault:
    """Raises at the n-th file operation, before or after doing it."""

    NAMES = ("fsync", "replace", "open", "mkdir", "rmdir", "unlink")

    def __init__(self, monkeypatch, at: int, error: BaseException, after: bool) -> None:
        self.count, self.at, self.error, self.after = 0, at, error, after
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, operation):
        def faulty(*args, **kwargs):
            self.count += 1
            if self.count == self.at and not self.after:
                raise self.error
            result = operation(*args, **kwargs)
            if self.count == self.at:
                raise self.error
            return result

        return faulty


def break_at_every_operation(tmp_path, error, prepare, act, check):
    """Break ``act`` at each operation in turn; ``check(folder, error)`` says what must hold after it."""
    broken = 0
    for after in (False, True):
        for at in range(1, 200):
            folder = tmp_path / f"{after}-{at}"
            prepare(folder)
            caught = None
            with pytest.MonkeyPatch.context() as patch:
                fault = Fault(patch, at, error, after)
                try:
                    act(folder)
                except (Killed, CheckpointError) as raised:
                    caught = raised
            check(folder, caught)
            if fault.count < at:
                break
            broken += 1
    return broken


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
def test_a_break_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, error, caplog):
    caplog.set_level(logging.CRITICAL)

    def prepare(folder):
        save(folder, 1)
        save(folder, 2)

    def check(folder, caught):
        step = latest(folder).step
        assert step in (2, 3) and (caught or step == 3)
        if isinstance(caught, CheckpointError):
            assert "step-00000003: could not be written: [Errno 28] No space left" in str(caught)
            assert "earlier checkpoints are unharmed. Free space" in str(caught)
        assert_holds(folder, step)
        assert latest(folder).skipped == ()
        save(folder, 3)
        assert_holds(folder, 3)
        assert steps(folder) == [2, 3] and not list(folder.glob(".*")), "the next save removes what the break left"

    assert break_at_every_operation(tmp_path, error, prepare, lambda folder: save(folder, 3), check) > 30


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths))[1])
    path = save(tmp_path, 1)
    renamed = events.index("renamed")
    assert {entry.stat().st_ino for entry in (path, *path.iterdir())} == set(events[:renamed])
    assert events[renamed - 2] == (path / "manifest.json").stat().st_ino, "the manifest is the last file"
    assert events[renamed + 1 :] == [tmp_path.stat().st_ino]


def test_a_break_while_a_step_is_replaced_loses_nothing(tmp_path):
    def prepare(folder):
        save(folder, 7)

    def act(folder):
        save_checkpoint(folder, weights(8), {"step": 8, "m": torch.full((2,), 8.0)}, 7)

    def check(folder, caught):
        state = load_checkpoint(latest(folder).path).state
        assert state["step"] == 8 if caught is None else state["step"] in (7, 8)
        save(folder, 9)
        assert steps(folder) == [7, 9] and not list(folder.glob(".*"))

    assert break_at_every_operation(tmp_path, Killed(), prepare, act, check) > 20


def test_a_break_while_weights_are_written(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def torn(tensors, path, **_):
        Path(path).write_bytes(b"\x10\x00")
        raise safetensors.SafetensorError("I/O error: disk full")

    with monkeypatch.context() as patch:
        patch.setattr("polymodal.training.state_files.save_file", torn)
        with pytest.raises(CheckpointError, match=r"step-00000002: could not be written: I/O error: disk full"):
            save(tmp_path, 2)
    assert_holds(tmp_path, 1)
    save(tmp_path, 2)
    assert_holds(tmp_path, 2)


# --- damage --------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "bytes, expected|not readable JSON"),
        (flip, "does not match its checksum|not readable JSON"),
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, expected|not readable JSON"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, caplog, name, damage, reason):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest / name)
    found = latest(tmp_path)
    assert found.step == 1
    assert [path for path, _ in found.skipped] == [newest]
    assert name in found.skipped[0][1]
    assert f"checkpoint {newest} skipped: {found.skipped[0][1]}" in caplog.text
    with pytest.raises(CheckpointError, match=f"step-00000002: .*({reason}).*; expected a complete checkpoint"):
        load_checkpoint(newest)
    shutil.rmtree(tmp_path / "step-00000001")
    assert latest(tmp_path) is None


def test_a_manifest_of_another_kind(tmp_path):
    path = save(tmp_path, 1)
    for content in ("[]", "{}", '{"checksum": "x"}', "null"):
        (path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest.json does not match its checksum"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"manifest.json is missing: it was not written to its end"):
        load_checkpoint(tmp_path / "step-00000009")


# --- frozen weights ------------------------------------------------------------------------------------------------


def test_frozen_weights_are_written_once_and_loaded_with_the_rest(tmp_path):
    frozen = {"b.weight": torch.randn(4, 4), "b.half": torch.randn(3).bfloat16(), "b.steps": torch.tensor(3)}
    base = save_base(tmp_path, frozen)
    written = (tmp_path / base / "weights.safetensors").stat().st_mtime_ns
    assert save_base(tmp_path, dict(reversed(frozen.items()))) == base
    assert (tmp_path / base / "weights.safetensors").stat().st_mtime_ns == written
    for step in (1, 2, 3):
        path = save(tmp_path, step, base=base)
    assert set(safetensors.torch.load_file(path / "weights.safetensors")) == {"a.weight", "a.bias"}
    loaded = load_checkpoint(path)
    assert loaded.base == base and set(loaded.weights) == {"a.weight", "a.bias", *frozen}
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in frozen.items())


def test_a_damaged_base_is_found_and_written_again(tmp_path):
    frozen = {"b.weight": torch.randn(4, 4)}
    base = save_base(tmp_path, frozen)
    path = save(tmp_path, 1, base=base)
    flip(tmp_path / base / "weights.safetensors")
    with pytest.raises(CheckpointError, match=f"{base}: weights.safetensors does not match its checksum"):
        load_checkpoint(path)
    assert latest(tmp_path) is None
    assert save_base(tmp_path, frozen) == base
    assert latest(tmp_path).step == 1


def test_a_base_goes_with_the_last_checkpoint_that_needs_it(tmp_path):
    first, second = (save_base(tmp_path, {"b": torch.tensor([value])}) for value in (1.0, 2.0))
    save(tmp_path, 1, base=first)
    assert (tmp_path / first).exists()
    second = save_base(tmp_path, {"b": torch.tensor([2.0])})
    save(tmp_path, 2, base=second)
    assert (tmp_path / first).exists() and (tmp_path / second).exists()
    save(tmp_path, 3, base=second)
    assert not (tmp_path / first).exists() and (tmp_path / second).exists()


# --- content -------------------------------------------------------------------------------------------------------


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.randn(50, 40)
    tensors = {"embed": weight, "head": weight, "row": weight[3], "turned": weight.T, "empty": torch.zeros(0, 2)}
    tensors |= {"empty2": torch.zeros(0, 3), "scalar": torch.tensor(2, dtype=torch.int64)}
    write_tensors(tmp_path / "w", tensors)
    assert set(safetensors.torch.load_file(tmp_path / "w")) == set(tensors) - {"head"}
    loaded = read_tensors(tmp_path / "w")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["head"] is loaded["embed"]


def test_equal_tensors_are_equal_files(tmp_path):
    weight = torch.randn(5, 4)
    for place in range(12):
        write_tensors(tmp_path / str(place), {"embed": weight, "head": weight, "other": weight + 1})
    assert len({(tmp_path / str(place)).read_bytes() for place in range(12)}) == 1


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "w").write_bytes(b"hello")
    for name in ("w", "nothing"):
        with pytest.raises(CheckpointError, match=f"{name}: not a readable safetensors file"):
            read_tensors(tmp_path / name)


def test_nested_state_survives_json():
    state = {
        "lr": 0.1,
        "nan": float("nan"),
        "inf": -float("inf"),
        "big": 2**100,
        "none": None,
        "flag": True,
        "pair": (1, ("x", [2.5])),
        "by_number": {0: {"m": torch.ones(2)}, 1: {"m": torch.zeros(2)}},
        "by_pair": {("a", 1): "b"},
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "$tuple": "a key that looks like a mark",
        "x.y": torch.tensor(1),
        "x": {"y": torch.tensor(2)},
    }
    data, tensors = split_state(state)
    back = join_state(json.loads(json.dumps(data, allow_nan=False)), tensors)
    assert back.keys() == state.keys() and list(back) == list(state)
    plain = ("lr", "inf", "big", "none", "flag", "pair", "by_pair", "$tuple")
    assert all(back[key] == state[key] and type(back[key]) is type(state[key]) for key in plain)
    assert back["nan"] != back["nan"]
    assert torch.equal(back["by_number"][0]["m"], torch.ones(2))
    assert back["array"].dtype == np.int32 and np.array_equal(back["array"], state["array"])
    assert (int(back["x.y"]), int(back["x"]["y"])) == (1, 2)


def test_state_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"state.loader.1: found set, which a checkpoint cannot hold; expect"):
        save_checkpoint(tmp_path, {}, {"loader": [1, {2}]}, 1)
    assert latest(tmp_path) is None


def test_random_state_goes_on_where_it_was(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)
    path = save_checkpoint(tmp_path, {}, {"random": random_state()}, 1)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(2).tolist(), torch.randn(3).tolist()

    first = draw()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    set_random_state(load_checkpoint(path).state["random"])
    assert draw() == first


def test_random_state_of_another_number_of_gpus_is_warned_of(caplog):
    state = random_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    set_random_state(state)
    assert "the checkpoint holds random states of 1 GPUs, 0 are here; GPU draws will differ" in caplog.text


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("use", OPTIMIZERS)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, use):
    config = OPTIMIZERS.parse({"use": use, "lr": 0.05, "lr_scale": {"norm": 0.5}})

    def advance(model, optimizer, num):
        for _ in range(num):
            x = model["norm"](model["embed"](torch.randint(5, (8,))))
            nn.functional.dropout(model["head"](x), 0.5).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = network()
    optimizer = config.build(model)
    torch.manual_seed(1)
    advance(model, optimizer, 3)
    state = {"optimizer": optimizer.state_dict(), "random": random_state()}
    path = save_checkpoint(tmp_path, model.state_dict(), state, 3)
    advance(model, optimizer, 3)

    again = network()
    resumed = config.build(again)
    loaded = load_checkpoint(path)
    load_weights(again, loaded.weights)
    resumed.load_state_dict(loaded.state["optimizer"])
    set_random_state(loaded.state["random"])
    advance(again, resumed, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again["head"].weight is again["embed"].weight


def test_weights_must_fit_exactly():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    given["embd.weight"] = given.pop("embed.weight")
    given["norm.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, given, "runs/x/step-00000004")
    assert str(error.value) == (
        "runs/x/step-00000004: the weights do not fit the model, found 7 tensors, expected 7:\n"
        "  missing embed.weight\n"
        "  norm.bias has shape [7], the model [4]\n"
        "  unexpected embd.weight (nearest missing: embed.weight)\n"
        "Build the model from the recipe that stands in the run folder, its adapters included"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "nothing was loaded"
    with pytest.raises(CheckpointError, match=r"found 1 tensors, expected 7:[\s\S]*unexpected x \(nearest missing: "):
        load_weights(model, {"x": torch.zeros(1)})
    many = {f"layer{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(CheckpointError, match="and 17 more"):
        load_weights(model, many)
