"""Every benchmark runs at tiny size and writes its figures; what it asserts about equality is thereby tested."""

import importlib
import json

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(name, tmp_path, *more):
    script = importlib.import_module(f"benchmarks.{name}")
    assert script.main(["--quick", "--out", str(tmp_path), *more]) == 0
    (path,) = tmp_path.glob(f"{name}-*.json")
    data = json.loads(path.read_text())
    assert data["quick"] and data["rounds"] >= 3 and data["hardware"]["cores"] >= 1
    assert data["tables"] and all(len(row) == len(t["columns"]) for t in data["tables"] for row in t["rows"])
    return data


def column(data, name, table=0):
    place = data["tables"][table]["columns"].index(name)
    return {row[0]: row[place] for row in data["tables"][table]["rows"]}


def test_packing(tmp_path):
    data = run("packing", tmp_path)
    masks, losses = column(data, "masks"), column(data, "loss")
    assert masks["packed, 8 samples"] == masks["packed, 16 samples"] == "0"
    assert masks["packed, 16 samples, dense mask"] != "0", "the spy on attention sees no mask where there is one"
    assert max(map(float, losses.values())) - min(map(float, losses.values())) < 1e-4


def test_packing_notices_a_mask_and_another_loss(tmp_path):
    packing = importlib.import_module("benchmarks.packing")
    with packing.watched_attention() as seen:
        x = torch.zeros(1, 1, 2, 4)
        F.scaled_dot_product_attention(x, x, x, torch.ones(2, 2, dtype=torch.bool))
    assert seen == {"masks": 1.0, "scores": 4.0}
    tiny = packing.shapes.decoder(16, 1, 1, 16)
    bench = packing.Bench(tiny, packing.shapes.tokenizer(400))
    rng = packing.np.random.default_rng(0)
    examples = [packing.shapes.plain_example(rng, n, 300) for n in (3, 5, 4, 6)]
    every = packing.cases(bench, examples)
    dense = every["packed, 16 samples, dense mask"]
    with pytest.raises(AssertionError, match="masks reached attention, expected none"):
        packing.prove(bench, {packing.STOCK: every[packing.STOCK], "packed, masked": dense})
    with pytest.raises(AssertionError, match="loss"):
        packing.prove(
            bench, {packing.STOCK: every[packing.STOCK], "wrong": (dense[0], lambda b: (torch.tensor(1.0), 1))}
        )


def test_feature_cache(tmp_path):
    data = run("feature_cache", tmp_path)
    assert [len(table["rows"]) for table in data["tables"]] == [2, 1, 2, 1]


def test_trainer(tmp_path):
    pytest.importorskip("transformers", reason="needs the other side: transformers and accelerate")
    pytest.importorskip("accelerate", reason="needs the other side: transformers and accelerate")
    data = run("trainer", tmp_path)
    for table in range(len(data["tables"])):
        losses = column(data, "mean loss", table)
        same = ("transformers Trainer, padded", "Polymodal, padded", "Polymodal, padded, padding computed")
        assert max(float(losses[name]) for name in same) - min(float(losses[name]) for name in same) < 1e-3


def test_loader(tmp_path):
    assert len(run("loader", tmp_path)["tables"][0]["rows"]) == 4


@pytest.mark.slow
def test_start(tmp_path):
    assert [len(table["rows"]) for table in run("start", tmp_path)["tables"]] == [3, 2]


@pytest.mark.slow
def test_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    data = run("checkpoint", tmp_path)
    peaks = {side: float(peak.split()[0]) for side, peak in column(data, "peak, MB").items()}
    imports = {side: float(size.split()[0]) for side, size in column(data, "imports, MB").items()}
    assert set(peaks) == {"polymodal", "transformers"}
    assert all(peaks[side] >= imports[side] > 50 for side in peaks), "sizes of the processes themselves"


def test_generation(tmp_path):
    assert len(run("generation", tmp_path)["tables"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without CUDA sees")
def test_mfu_says_that_it_needs_cuda(tmp_path, capsys):
    mfu = importlib.import_module("benchmarks.mfu")
    assert mfu.main(["--out", str(tmp_path)]) == 2
    assert "found no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_mfu_runs_on_a_cpu_at_tiny_size(tmp_path):
    assert len(run("mfu", tmp_path, "--device", "cpu")["tables"][0]["rows"]) == 1


def test_mfu_counts_the_flops_of_matrix_products():
    """Against torch's own counter, attention scores apart, which it does not count on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    mfu = importlib.import_module("benchmarks.mfu")
    shape = mfu.tiny(3)
    bench = mfu.Bench(shape, None, "cpu", compiled=False)
    batch = bench.batches[0]
    with FlopCounterMode(display=False) as counter:
        outputs = bench.network(batch, ("sequence",))
        bench.objective(outputs, batch).total.backward()
    patches, text = 16, 4 + shape.text_tokens
    scores = 3 * 3.0 * (4.0 * 2 * patches**2 * 32 + 2.0 * 2 * text**2 * 32)
    # The pictures need no gradient: torch counts one backward product less for the patch embedding.
    spared = 2.0 * 3 * patches * 3 * 16**2 * 32
    assert bench.flops - scores - spared == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_fewer_than_three_rounds_are_refused(capsys):
    harness = importlib.import_module("benchmarks.harness")
    with pytest.raises(SystemExit):
        harness.parse_options("x", ["--repeat", "2"])
    assert "one round says nothing about its own noise" in capsys.readouterr().err


def test_ratios_are_taken_round_by_round():
    harness = importlib.import_module("benchmarks.harness")
    slow, fast = (
        harness.Row("slow", [2.0, 4.0, 8.0], [1.0] * 3, 10.0),
        harness.Row("fast", [1.0, 2.0, 4.0], [0.5] * 3, 10.0),
    )
    assert harness.ratios(fast, slow) == [2.0, 2.0, 2.0]
    assert harness.cpu_ratios(fast, slow) == [2.0, 2.0, 2.0]
    assert harness.cpu_ratio([slow, fast], "fast", "slow") == 2.0


def test_dropping(tmp_path):
    data = run("dropping", tmp_path)
    saved = list(column(data, "saved by the equation").values())
    assert saved[0] == "0.0%" and 0 < float(saved[1][:-1]) < float(saved[2][:-1]) < 100
