"""Loading a published checkpoint: time and peak memory against the reference library, each side in its own process."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

_WIDTH, _DEPTH, _ROWS = 1280, 12, 12_000
"""A Llama of 1.07 GB in float32."""
_PEAK_RATIO = 1.15
OURS, THEIRS = "polymodal", "transformers"


def write_checkpoint(folder: Path, quick: bool) -> None:
    """A Llama with random weights and a tokenizer, as the reference library saves it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width, depth = (64, 2) if quick else (_WIDTH, _DEPTH)
    config = LlamaConfig(
        vocab_size=_ROWS,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<s>", "</s>"]
    backend = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def peak_mb() -> float:
    """Largest resident set of this process so far; ``getrusage`` would begin with that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def child(side: str, folder: Path, answers: bool) -> dict[str, Any]:
    """Import, load, and answer if asked to; what it took."""
    import numpy as np
    import torch

    if side == OURS:
        import polymodal

        # What it needs is imported here: imports are not what is compared.
        load = polymodal.load
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
    torch.set_num_threads(1)
    found: dict[str, Any] = {"imports_mb": peak_mb()}
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    started, cpu = time.perf_counter(), time.process_time()
    if side == OURS:
        model = load(folder)
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found["seconds"], found["cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
    if answers:
        # Mapped weights are read when they are used: the first pass is part of the price.
        started, cpu = time.perf_counter(), time.process_time()
        if side == OURS:
            logits = model.logits(["The quick brown fox"])
        else:
            with torch.no_grad():
                logits = model(**tokenizer("The quick brown fox", return_tensors="pt")).logits[0].numpy()
        found["first_seconds"], found["first_cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
        found["sum"] = float(np.abs(logits).sum())
    found["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    found["peak_mb"] = peak_mb()
    return found


def measure(side: str, folder: Path) -> dict[str, Any]:
    """One new process."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--child", side, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=harness.ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(options: harness.Options) -> harness.Result:
    """Measure both sides in turn."""
    result = harness.Result("checkpoint", "Loading a checkpoint, against the reference library")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "llama"
        write_checkpoint(folder, options.quick)
        file_mb = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1024**2
        rounds: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
        # One unmeasured process reads the file into the system's cache for both.
        measure(THEIRS, folder)
        for turn in range(options.repeat):
            for side in (OURS, THEIRS) if turn % 2 == 0 else (THEIRS, OURS):
                rounds[side].append(measure(side, folder))
    sums = [found["sum"] for found in (rounds[OURS][0], rounds[THEIRS][0])]
    if abs(sums[0] - sums[1]) > 1e-3 * sums[1]:
        raise AssertionError(f"the sides do not compute the same: {sums}")
    _report(result, rounds, file_mb)
    return result


def _report(result: harness.Result, rounds: dict[str, list[dict[str, Any]]], file_mb: float) -> None:
    rows = []
    for side, found in rounds.items():
        both = [one["seconds"] + one["first_seconds"] for one in found]
        cpu = [one["cpu_seconds"] + one["first_cpu_seconds"] for one in found]
        grown = [one["peak_mb"] - one["imports_mb"] for one in found]
        rows.append(
            [
                side,
                _spread([one["seconds"] for one in found]),
                _spread(both),
                _spread(cpu),
                f"{statistics.median(one['faults'] for one in found):,.0f}",
                _spread([one["imports_mb"] for one in found], 0),
                _spread([one["peak_mb"] for one in found], 0),
                f"{statistics.median(grown) / file_mb:.2f}",
            ]
        )
    columns = [
        "side",
        "load, s",
        "load and first pass, s",
        "the same, CPU s",
        "page faults",
        "imports, MB",
        "peak, MB",
        "growth / file",
    ]
    result.add_table(f"A Llama of {file_mb:,.0f} MB in float32, memory as peak resident set", columns, rows)
    pairs = list(zip(rounds[OURS], rounds[THEIRS], strict=True))
    for what, first in (("load", ()), ("load and first pass", ("first_",))):
        for kind, key in (("CPU", "cpu_seconds"), ("wall", "seconds")):
            keys = [prefix + key for prefix in ("", *first)]
            # Neighbours in time: what else the machine does weighs on both.
            ratios = [sum(theirs[key] for key in keys) / sum(ours[key] for key in keys) for ours, theirs in pairs]
            result.add_goal(f"{what}: reference's {kind} time over ours", 1.0, statistics.median(ratios))
    growth = statistics.median((ours["peak_mb"] - ours["imports_mb"]) / file_mb for ours in rounds[OURS])
    growth = round(growth, 3)
    met = growth <= _PEAK_RATIO
    result.goals.append(
        harness.Goal("peak memory beyond the imports, over the file", f"<= {_PEAK_RATIO}x", growth, met)
    )
    result.notes += [
        "imports are done before the clock starts; the tokenizer is loaded by both sides",
        "weights are mapped on our side, so that loading alone reads little: the first pass over one prompt is counted "
        "with it, and the peak is taken after it; mapped pages count as resident",
        "both sides' logits are equal within 1e-3 before anything is reported",
    ]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; with ``--child`` as one measured process."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--child", choices=(OURS, THEIRS))
    parser.add_argument("--folder", type=Path)
    known, rest = parser.parse_known_args(argv)
    if known.child:
        print(json.dumps(child(known.child, known.folder, answers=True)))
        return 0
    options = harness.parse_options(__doc__, rest, repeat=5)
    run(options).finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
