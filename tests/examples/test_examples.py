import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import polymodal as pm

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NAMES = ("hub", "missing", "interaction", "reliability", "ambiguity", "continual", "bootstrapping")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load_module(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load_module
    for name in ("scene", "trial", "write_readme"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quick_run_gives_every_row(name, load, tmp_path):
    result_file = tmp_path / "scores.json"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--seeds", "1", "--json", str(result_file)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(result_file.read_text())
    example = load(name).EXAMPLE
    assert [row["row"] for row in result["rows"]] == list(example.rows)
    assert all(0 <= row["min"] <= row["mean"] <= row["max"] <= 1 for row in result["rows"])
    assert [claim["claim"] for claim in result["claims"]] == [claim.text for claim in example.claims]
    assert all(text in run.stdout for text in example.rows.values())
    assert "the scores mean nothing" in run.stdout


@pytest.mark.parametrize("name", NAMES)
def test_recipe_passes_check(name, load, tmp_path):
    load(name).make_data(tmp_path, 0, True)
    report = pm.check(str(EXAMPLES / f"{name}.yaml"), [f"data_root={tmp_path}"])
    assert report.is_ok, [proof for proof in report.proofs if proof.status == "failed"]


@pytest.mark.parametrize("name", NAMES)
def test_encoders_are_small(name, load, tmp_path):
    load(name).make_data(tmp_path, 0, True)
    network = pm.build(str(EXAMPLES / f"{name}.yaml"), [f"data_root={tmp_path}"])
    for stream in network.streams.values():
        assert sum(p.numel() for p in stream.encoder.parameters()) < 400_000


def test_summary_gives_mean_range_and_claims_over_seeds(load):
    load("hub")
    from trial import Claim, Example, summary, table

    example = Example("x", "title", {"a": "what a is"}, [Claim("a is high", lambda s: s["a"] > 0.5)], lambda *_: {})
    result = summary(example, [{"a": 0.6}, {"a": 0.9}], quick=False, seconds={"wall": 2.0, "cpu": 1.0})
    assert result["rows"][0] == {
        "row": "a", "what": "what a is", "mean": 0.75, "min": 0.6, "max": 0.9, "scores": [0.6, 0.9]
    }  # fmt: skip
    assert result["claims"] == [{"claim": "a is high", "holds": True}]
    assert "what a is  0.750  0.600 - 0.900" in table(result)
    assert "holds  a is high" in table(result)
    one_low = summary(example, [{"a": 0.6}, {"a": 0.4}], quick=False, seconds={"wall": 2.0, "cpu": 1.0})
    assert "FAILS  a is high" in table(one_low)


def test_written_samples_read_back_as_rendered(load, tmp_path):
    load("hub")
    import numpy as np
    from scene import Thing, caption, cloud, movement, picture, shuffled, sound, write_samples

    from polymodal.data.sources import open_source

    rng = np.random.default_rng(0)
    thing = Thing(1, 2, 3, 1)
    assert thing.label == "blue disc"
    samples = [
        pm.Sample(
            f"s{i}",
            views={
                "image": picture(thing, rng),
                "audio": sound(thing, rng),
                "points": cloud(thing, rng),
                "sensor": movement(thing, rng),
                "text": pm.Text(caption(thing, rng)),
            },
            label=thing.label,
        )
        for i in range(3)
    ]
    write_samples(tmp_path / "things.jsonl", samples)
    read = open_source(tmp_path / "things.jsonl")
    assert len(read) == 3
    assert read[1].label == "blue disc"
    assert read[1].views["text"].text == samples[1].views["text"].text
    assert np.array_equal(np.load(read[1].views["points"].path), samples[1].views["points"].source)
    assert read[1].views["sensor"].rate_hz == 20
    dealt = shuffled(samples, "image", np.random.default_rng(1))
    assert {id(s.views["image"]) for s in dealt} == {id(s.views["image"]) for s in samples}
    assert [s.views["audio"] for s in dealt] == [s.views["audio"] for s in samples]


def test_readme_shows_the_stored_results(load):
    load("hub")
    import write_readme

    shown = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert write_readme.tables() in shown
    assert all((EXAMPLES / "results" / f"{name}.json").is_file() for name in NAMES)
    for name in NAMES:
        result = json.loads((EXAMPLES / "results" / f"{name}.json").read_text())
        assert not result["quick"]
        assert result["seeds"] >= 3
        assert [row["row"] for row in result["rows"]] == list(load(name).EXAMPLE.rows)
