"""The merge backbone: where tokens are laid, what absence means, modality dropout, and mismatched samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, build, medium, merge_data

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Part, Text
from polymodal.core.samples import Sample
from polymodal.models.compose.merge import Merge
from polymodal.models.compose.negatives import mismatched
from polymodal.objectives.classify import Classify
from polymodal.objectives.matching import Matching

TEXTS = ("a red cube", "a beep", "it spins and falls", "blue")
STREAMS = ("text", "image", "audio")
MATCHING: dict[str, Any] = {"heads": {"match": {"use": "matching"}}}


def thing(index: int, *names: str, label: str | None = None) -> Sample:
    views: dict[str, Part] = {
        name: Text(TEXTS[index % 4]) if name == "text" else medium(name, index, 1 + index % 3) for name in names
    }
    return Sample(f"t{index}", views=views, label=label)


def merged(toy: Toy, samples: list[Sample]) -> torch.Tensor:
    with torch.no_grad():
        return toy.network(toy.batch(samples), ("merge",)).merged


def merge_of(toy: Toy) -> Merge:
    assert isinstance(toy.network.backbone, Merge)
    return toy.network.backbone


def items_of(toy: Toy, samples: list[Sample]) -> dict[str, Any]:
    batch = toy.batch(samples)
    return {
        name: (toy.network.streams[name].connector, toy.network.encode(name, entry), entry)
        for name, entry in batch.streams.items()
    }


@pytest.mark.parametrize("take", ["pooled", "tokens"])
@pytest.mark.parametrize("missing", ["absent", "learned"])
def test_neighbours_and_order_do_not_matter(take: str, missing: str) -> None:
    toy = build(merge_data("cross_attention", take=take, missing=missing))
    samples = [thing(0, *STREAMS), thing(1, "image"), thing(2, "text", "audio"), thing(3, "audio")]
    together = merged(toy, samples)
    torch.testing.assert_close(merged(toy, samples[::-1]).flip(0), together, rtol=1e-5, atol=1e-5)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(merged(toy, [sample])[0], together[row], rtol=1e-5, atol=1e-5)


def test_tokens_are_laid_out_by_sample() -> None:
    toy = build(merge_data(take="tokens"))
    samples = [thing(0, "image"), thing(1, "text"), thing(2, "image", "audio")]
    tokens, is_valid = merge_of(toy).lay_out(items_of(toy, samples), 3)
    assert is_valid["image"].sum(1).tolist() == [4, 0, 4]
    assert is_valid["text"].any(1).tolist() == [False, True, False]
    assert tokens["image"].shape == (3, 4, 16)
    connector, features, _ = items_of(toy, samples)["image"]
    expected, _ = connector(features.x_UND, features.is_valid_UN)
    assert torch.equal(tokens["image"][[0, 2]], expected)
    assert not tokens["image"][1].any()


def test_several_units_of_an_item_follow_each_other() -> None:
    data = merge_data(take="tokens")
    reader = {"use": "image", "size_px": 16, "resolution": "anyres", "grids": [[1, 2]], "thumbnail": True}
    data["streams"]["image"] = {**data["streams"]["image"], "reader": reader}
    toy = build(data)
    tokens, is_valid = merge_of(toy).lay_out(items_of(toy, [thing(0, "image"), thing(1, "text"), thing(2, "image")]), 3)
    assert tokens["image"].shape == (3, 12, 16)
    assert is_valid["image"].sum(1).tolist() == [12, 0, 12]


def test_an_absent_stream_stays_out_and_a_learned_token_stands_in() -> None:
    absent, learned = build(merge_data("sum")), build(merge_data("sum", missing="learned"))
    sample = [thing(0, "image")]
    assert not dict(absent.network.named_parameters()).keys() & {"backbone.missing.text"}
    learned.network.load_state_dict(absent.network.state_dict(), strict=False)
    difference = merged(learned, sample) - merged(absent, sample)
    fusion = merge_of(learned).fusion
    stand_ins = sum(fusion.maps[name](merge_of(learned).missing[name]) for name in ("text", "audio"))
    torch.testing.assert_close(difference[0], stand_ins.detach())


def test_a_learned_token_gets_a_gradient_only_where_its_modality_is_absent() -> None:
    toy = build(merge_data(missing="learned"))
    toy.network(toy.batch([thing(0, "image", "text")]), ("merge",)).merged.square().sum().backward()
    missing = merge_of(toy).missing
    assert missing["audio"].grad.any()
    assert not missing["image"].grad.any() and not missing["text"].grad.any()


def test_dropout_happens_at_its_rate_in_training_only_and_never_takes_the_last() -> None:
    toy = build(merge_data(dropout=0.9))
    merge = merge_of(toy)
    samples = [thing(index, *STREAMS) for index in range(4)] + [thing(5, "image"), thing(6, "audio")]
    items = items_of(toy, samples)
    _, is_valid = merge.lay_out(items, len(samples))
    assert all(bool(is_valid[name][:4].any(1).all()) for name in STREAMS)
    torch.manual_seed(0)
    merge.train()
    counts = []
    for _ in range(200):
        _, is_valid = merge.lay_out(items, len(samples))
        counts.append(torch.stack([is_valid[name].any(1) for name in STREAMS]).sum(0))
    present = torch.stack(counts).float()
    assert float(present.min()) == 1.0
    # Of three streams, each lost with 0.9, none is lost where all would be: 3 * 0.1 + 3 * 0.9 ** 3 on average.
    assert float(present[:, :4].mean()) == pytest.approx(0.3 + 3 * 0.729, abs=0.1)


def test_a_batch_without_any_merged_stream_is_refused() -> None:
    toy = build(merge_data())
    with pytest.raises(ConfigError, match=r"no sample of the batch has one of the merged streams \['audio', 'image'"):
        merge_of(toy).lay_out({}, 2)


def test_mismatched_samples_differ_from_their_own_in_exactly_one_stream() -> None:
    toy = build(merge_data(take="tokens", **MATCHING))
    merge = merge_of(toy)
    samples = [thing(0, *STREAMS), thing(1, "image", "text"), thing(2, "audio"), thing(3, "text", "audio")]
    tokens, is_valid = merge.lay_out(items_of(toy, samples), 4)
    donors: dict[int, set[tuple[str, int]]] = {}
    torch.manual_seed(0)
    for _ in range(60):
        mixed, mixed_valid, rows = mismatched(tokens, is_valid, torch.arange(4))
        assert rows.tolist() == [0, 1, 3]
        for place, row in enumerate(rows.tolist()):
            changed = [name for name in STREAMS if not torch.equal(mixed[name][place], tokens[name][row])]
            assert len(changed) == 1
            (name,) = changed
            assert is_valid[name][row].any()
            (donor,) = (d for d in range(4) if torch.equal(mixed[name][place], tokens[name][d]))
            assert torch.equal(mixed_valid[name][place], is_valid[name][donor]) and is_valid[name][donor].any()
            donors.setdefault(row, set()).add((name, donor))
    assert donors[1] == {("image", 0), ("text", 0), ("text", 3)}
    assert donors[0] == {("image", 1), ("text", 1), ("text", 3), ("audio", 2), ("audio", 3)}


def test_where_nothing_can_be_mismatched_the_objective_counts_nothing() -> None:
    toy = build(merge_data(**MATCHING))
    for samples in (
        [thing(0, *STREAMS)],
        [thing(0, "image"), thing(1, "audio")],
        [thing(0, "image"), thing(1, "image")],
        [thing(index, *STREAMS, label="one") for index in range(3)],
        [thing(0, "image", "text"), thing(4, "image", "text")],
    ):
        batch = toy.batch(samples)
        outputs = toy.network(batch, ("match",))
        assert outputs.match_logits.shape == (len(samples),)
        assert outputs.mismatch_logits.shape == (0,)
        report = Matching(negatives="batch")(outputs, batch)
        assert report.count == 0 and float(report.total) == 0.0


def test_matching_needs_the_pass_that_its_negatives_come_from() -> None:
    assert Matching().needs == "merge"
    assert Matching(negatives="batch").needs == "match"
    toy = build(merge_data(**MATCHING))
    batch = toy.batch([thing(0, *STREAMS), thing(1, *STREAMS)])
    with pytest.raises(ConfigError, match="mismatch_logits"):
        Matching(negatives="batch")(toy.network(batch, ("merge",)), batch)


def test_a_merge_pass_of_a_match_pass_is_the_same() -> None:
    toy = build(merge_data(**MATCHING))
    batch = toy.batch([thing(0, *STREAMS), thing(1, *STREAMS)])
    one, both = toy.network(batch, ("merge",)), toy.network(batch, ("merge", "match"))
    assert torch.equal(one.match_logits, both.match_logits)
    assert torch.equal(one.merged, both.merged)
    report = Matching(negatives="batch")(both, batch)
    assert report.count == 4


def train(toy: Toy, batch: Any, objective: Any, steps: int) -> None:
    optimizer = torch.optim.Adam(toy.network.parameters(), 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(toy.network(batch, (objective.needs,)), batch).total.backward()
        optimizer.step()


@pytest.mark.parametrize(("fusion", "learns"), [("product", True), ("sum", False)])
def test_matching_against_the_batch_is_learnt_by_products_and_not_by_sums(fusion: str, learns: bool) -> None:
    """Text and picture are of one of two kinds; only together do they say whether they belong together."""
    torch.manual_seed(0)
    data = merge_data(fusion, **MATCHING)
    del data["streams"]["audio"]
    toy = build(data)
    samples = [
        Sample(f"{kind}", views={"text": Text(TEXTS[kind]), "image": medium("image", kind)}) for kind in range(2)
    ]
    batch = toy.batch(samples)
    objective = Matching(negatives="batch")
    train(toy, batch, objective, 80)
    losses = [float(objective(toy.network(batch, ("match",)), batch).total.detach()) for _ in range(5)]
    # A sum of maps cannot express "same kind": over the four combinations its best loss is ln 2.
    assert (max(losses) < 0.3) if learns else (min(losses) > 0.6)


def test_a_class_head_learns_labels() -> None:
    toy = build(merge_data("gated", take="tokens"))
    samples = [thing(index, *STREAMS, label="abc"[index % 3]) for index in range(3)]
    batch = toy.batch(samples)
    objective = Classify(classes=("a", "b", "c"))
    train(toy, batch, objective, 40)
    assert float(objective(toy.network(batch, ("merge",)), batch).total.detach()) < 0.1
