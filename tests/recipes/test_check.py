"""Every planted fault is caught by the proof that is named after it, and by no accident of another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small_recipes
import torch
from torch import nn

from polymodal.core.errors import CheckFailed, ConfigError
from polymodal.modalities.processor import Processor
from polymodal.modalities.text import chat
from polymodal.models.backbones import decoder
from polymodal.models.compose.config import ModelConfig
from polymodal.models.layers.layout import Layout
from polymodal.recipes import check as check_module
from polymodal.recipes import proofs_of_training
from polymodal.recipes.check import CheckReport, check_recipe
from polymodal.recipes.loading import load_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"), num=20)


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    return small_recipes.write_data(tmp_path / "own", num=20)


def run(data: dict[str, Any]) -> CheckReport:
    return check_recipe(load_recipe(data))


def failures(report: CheckReport) -> dict[str, str]:
    return {proof.name: proof.figure for proof in report.failed}


def test_a_sound_recipe_passes_every_proof_and_says_its_figures(root: Path) -> None:
    seen = []
    data = small_recipes.decoder_recipe(root, small_recipes.contrast_stage(), small_recipes.stage())
    data["evaluate"] = [{"use": "questions", "data": "questions.jsonl"}]
    report = check_recipe(load_recipe(data), seen.append)
    assert report.is_ok and not failures(report), failures(report)
    assert seen == report.proofs
    report.raise_failed()
    figures = {(proof.where, proof.name): proof.figure for proof in report.proofs if proof.status == "ok"}
    assert figures["stage tune", "data is there"] == "20 captions.jsonl, 20 questions.jsonl"
    assert figures["evaluate", "data is there"] == "20 questions.jsonl"
    assert figures["stage tune", "targets are the assistant's own words"] == "40 samples, word for word"
    counted = figures["stage tune", "placeholders = features"].split(" = ")
    assert counted[0] == counted[1] and int(counted[0]) > 100
    assert "leak 0" in figures["stage tune", "packing leaks nothing"]
    assert "hashes equal" in figures["stage contrast", "frozen parts stay frozen"]
    assert "for 4 steps" in figures["stage tune", "predicted cost"]
    assert report.to_data()["ok"] and len(report.to_data()["proofs"]) == len(report.proofs)


def test_a_placeholder_count_off_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ModelConfig.count_tokens
    monkeypatch.setattr(ModelConfig, "count_tokens", lambda self, name, lengths: right(self, name, lengths) + 1)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert "placeholders = features" in found
    assert "stream 'image'" in found["placeholders = features"] and "of 16 items" in found["placeholders = features"]


def test_a_chat_format_that_hides_all_labels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = chat.ChatFormat.render

    def hide(self: Any, *args: Any, **options: Any) -> Any:
        return [dataclasses.replace(part, is_supervised=False) for part in render(self, *args, **options)]

    monkeypatch.setattr(chat.ChatFormat, "render", hide)
    report = run(small_recipes.decoder_recipe(root))
    assert list(failures(report)) == ["every sample has supervised tokens"]
    assert "40 of 40 samples have no target (100.0%)" in failures(report)["every sample has supervised tokens"]


def test_view_sets_in_a_stage_that_reads_conversations(root: Path) -> None:
    stage = small_recipes.stage(data=["captions.jsonl", "views.jsonl"], train=["streams.image", "backbone"])
    found = failures(run(small_recipes.decoder_recipe(root, stage)))
    assert "20 of 40 samples are view sets, the first is ['v0']" in found["every sample has supervised tokens"]


def test_a_chat_format_that_supervises_the_question(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = chat.ChatFormat.render

    def show(self: Any, *args: Any, **options: Any) -> Any:
        segments = render(self, *args, **options)
        return [dataclasses.replace(part, is_supervised=bool(part.text)) for part in segments]

    monkeypatch.setattr(chat.ChatFormat, "render", show)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert "the assistant said" in found["targets are the assistant's own words"]


def test_truncation_through_an_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted twice: by a recipe whose room ends inside the image, and by a processor that cuts there."""
    data = small_recipes.decoder_recipe(root, small_recipes.stage(data=["captions.jsonl"]), overflow="cut_text")
    data["model"]["backbone"]["max_tokens"] = 4
    found = failures(run(data))
    assert list(found) == ["samples fit, no media span is cut"]
    assert "cutting there would cut through or drop 1 media span(s)" in found["samples fit, no media span is cut"]

    def cut(self: Processor, plan: Any) -> None:
        del plan.ids[4:], plan.is_supervised[4:]
        plan.is_supervised[-1] = True

    monkeypatch.setattr(Processor, "_fit", cut)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert "its span is cut" in found["samples fit, no media span is cut"]


def test_a_frozen_part_made_trainable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_module.apply_train

    def thaw(network: nn.Module, *args: Any) -> set[str]:
        trained = right(network, *args)
        for parameter in network.get_submodule("streams.image.encoder").parameters():
            parameter.requires_grad_(True)
        return trained

    monkeypatch.setattr(check_module, "apply_train", thaw)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert list(found) == ["frozen parts stay frozen"]
    assert "parameters train that the stage does not name" in found["frozen parts stay frozen"]
    assert "streams.image.encoder" in found["frozen parts stay frozen"]


def test_a_frozen_tensor_that_changes_without_a_gradient(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = proofs_of_training._backward

    def drift(attempt: Any) -> None:
        right(attempt)
        with torch.no_grad():
            next(attempt.network.get_submodule("streams.image.encoder").parameters()).add_(1.0)

    monkeypatch.setattr(proofs_of_training, "_backward", drift)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert found["frozen parts stay frozen"] == "a frozen tensor changed in an optimizer step"


def test_an_adapter_that_matches_nothing(root: Path) -> None:
    adapter = {"use": "lora", "match": ["*.attention.qkv"]}
    stage = small_recipes.stage(train=[{"part": "backbone", "adapter": adapter}])
    found = failures(run(small_recipes.decoder_recipe(root, stage)))
    assert list(found) == ["what trains is found"]
    assert "adapter.match" in found["what trains is found"] and "*.attention.qkv" in found["what trains is found"]


def test_an_adapter_on_a_tied_weight(root: Path) -> None:
    stage = small_recipes.stage(train=[{"part": "heads.answer", "adapter": {"use": "lora"}}])
    found = failures(run(small_recipes.decoder_recipe(root, stage)))
    assert "is tied to backbone.embed_tokens.weight" in found["what trains is found"]


def test_a_trained_part_that_no_data_reaches(root: Path) -> None:
    stage = small_recipes.stage(data=["captions.jsonl"])
    found = failures(run(small_recipes.decoder_recipe(root, stage)))
    assert list(found) == ["every trained part gets a gradient"]
    assert "no gradient reaches streams.sensor.connector;" in found["every trained part gets a gradient"]


def test_packing_that_leaks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that is treated as one long sequence: later samples see earlier ones."""
    monkeypatch.setattr(
        decoder, "batch_layout", lambda batch: Layout.padded(None, causal=True, positions_BT=batch.positions)
    )
    from polymodal.models.compose import model

    monkeypatch.setattr(model, "batch_layout", decoder.batch_layout)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert "changing one sample of a pack changes another's loss" in found["packing leaks nothing"]
    assert "padding and order change nothing" not in found


def test_padding_that_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted from the right: a sample's result depends on how much padding its batch needs."""
    from polymodal.models.compose import model

    right = decoder.batch_layout

    def shifted(batch: Any) -> Layout:
        if batch.segment_lengths is not None:
            return right(batch)
        bidirectional = Layout.padded(None, causal=False, positions_BT=batch.positions)
        return bidirectional

    monkeypatch.setattr(model, "batch_layout", shifted)
    found = failures(run(small_recipes.decoder_recipe(root)))
    assert "padding or order changes a sample's loss" in found["padding and order change nothing"]


def test_media_that_end_too_early_are_named(own_root: Path) -> None:
    (own_root / "3.png").write_bytes((own_root / "3.png").read_bytes()[:90])
    found = failures(run(small_recipes.decoder_recipe(own_root, max_bad_rate=0.0)))
    assert list(found) == ["samples can be read and laid out"]
    assert "3.png" in found["samples can be read and laid out"] and "c3" in found["samples can be read and laid out"]


def test_corrupt_media_are_named_and_counted_and_only_too_many_fail(own_root: Path) -> None:
    content = bytearray((own_root / "3.png").read_bytes())
    content[60:90] = bytes(30)
    (own_root / "3.png").write_bytes(content)
    stage = small_recipes.stage(data=["captions.jsonl"], train=["streams.image", "backbone"])
    tolerant = run(small_recipes.decoder_recipe(own_root, stage, max_bad_rate=0.05))
    figure = next(proof.figure for proof in tolerant.proofs if proof.name == "media decode")
    assert tolerant.is_ok, failures(tolerant)
    assert "1 of 20 samples have damaged media (5.0%)" in figure and "3.png" in figure
    strict = failures(run(small_recipes.decoder_recipe(own_root, stage, max_bad_rate=0.01)))
    assert list(strict) == ["media decode"]
    assert "3.png" in strict["media decode"] and "At most 1.0% are tolerated (max_bad_rate)" in strict["media decode"]


def test_a_media_file_that_is_absent_is_named(own_root: Path) -> None:
    (own_root / "5.npy").unlink()
    found = failures(run(small_recipes.decoder_recipe(own_root, max_bad_rate=0.0)))
    assert list(found) == ["samples can be read and laid out"]
    assert "5.npy" in found["samples can be read and laid out"] and "q5" in found["samples can be read and laid out"]


def test_a_missing_data_file_is_named_before_anything_is_built(root: Path) -> None:
    report = run(small_recipes.decoder_recipe(root, small_recipes.stage(data=["captions.jsonl", "nothing.jsonl"])))
    assert list(failures(report)) == ["data is there"]
    assert "nothing.jsonl" in failures(report)["data is there"]
    assert not [proof for proof in report.proofs if proof.name == "parts build"]
    data = small_recipes.decoder_recipe(root)
    data["evaluate"] = [{"use": "questions", "data": "no_task.jsonl"}]
    assert "no_task.jsonl" in failures(run(data))["data is there"]
    validated = small_recipes.stage(validation="no_validation.jsonl", eval_every=2)
    assert "no_validation.jsonl" in failures(run(small_recipes.decoder_recipe(root, validated)))["data is there"]


def test_labels_that_the_class_head_does_not_know(own_root: Path) -> None:
    assert run(small_recipes.merge_recipe(own_root)).is_ok
    lines = small_recipes.read_lines(own_root / "views.jsonl")
    lines[7]["label"] = "gren"
    small_recipes.write_lines(own_root / "views.jsonl", lines)
    found = failures(run(small_recipes.merge_recipe(own_root)))
    assert "sample v7: unknown label 'gren'; did you mean 'green'?" in found["labels are known"]
    small_recipes.write_lines(own_root / "views.jsonl", [{**line, "label": None} for line in lines])
    found = failures(run(small_recipes.merge_recipe(own_root)))
    assert "none of 20 samples has a label" in found["labels are known"]


def test_a_part_that_breaks_is_a_failed_proof_and_the_others_still_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    # Training reads some tokens alone.
    monkeypatch.setattr(decoder.Decoder, "forward", fail)
    monkeypatch.setattr(decoder.Decoder, "read", fail)
    report = run(small_recipes.decoder_recipe(root))
    found = failures(report)
    assert found["packing leaks nothing"] == "broke with RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert "placeholders = features" not in found and report.proofs[-1].status == "ok"


def test_a_report_with_failures_raises_all_of_them_by_name() -> None:
    proofs = [check_module.Proof("one", "here", "failed", "3 of 4"), check_module.Proof("two", "there", "ok", "fine")]
    report = CheckReport("r", proofs)
    assert not report.is_ok
    with pytest.raises(CheckFailed, match=r"^one \(here\): 3 of 4$"):
        report.raise_failed()


def test_a_check_leaves_no_trace_in_the_model(root: Path) -> None:
    """The same check twice gives the same figures, times and memory apart."""
    data = small_recipes.decoder_recipe(root, small_recipes.stage(), small_recipes.stage("more"))
    first, second = run(data), run(data)
    figures = [[p.figure for p in report.proofs if p.name != "predicted cost"] for report in (first, second)]
    assert figures[0] == figures[1]


def test_a_recipe_with_unknown_streams_in_its_pairs_is_refused(root: Path) -> None:
    stage = small_recipes.contrast_stage(objectives={"infonce": {"pairs": [["imge", "text"]]}})
    with pytest.raises(ConfigError, match=r"stages.contrast.objectives.infonce.*'imge'; did you mean 'image'"):
        load_recipe(small_recipes.decoder_recipe(root, stage))
