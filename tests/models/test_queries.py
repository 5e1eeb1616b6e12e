"""A Q-Former that reads texts beside its queries: who sees whom, the three objectives of BLIP-2's first stage, and the
same weights in its second.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import Toy, asked, build, medium

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Part, Text
from polymodal.core.passes import TokenPass
from polymodal.core.samples import Sample
from polymodal.models.compose import ModelConfig
from polymodal.models.compose.negatives import hard_mismatched
from polymodal.models.compose.queries import QueryRun
from polymodal.models.compose.readouts import supports
from polymodal.models.connectors.qformer import QFormer, QFormerConfig
from polymodal.models.layers.memory import Memory
from polymodal.objectives.infonce import InfoNCE
from polymodal.objectives.masked import Caption
from polymodal.objectives.matching import Matching

TEXTS = ("a red cube", "blue", "what is it that falls?", "it spins")
CAPTION = TokenPass("caption", "")
HEADS = {
    "answer": {"use": "next_token"},
    "space": {"use": "projection", "dim": 8, "streams": ["image", "words"], "through": ["image", "words"]},
    "match": {"use": "matching", "at": "queries", "outputs": 2},
    "caption": {"use": "masked_token", "stream": "words", "at": "queries"},
}


def data(**changes: Any) -> dict[str, Any]:
    image = {"use": "vit", "image_size": 16, "patch_size": 8, "width": 12, "depth": 1, "heads": 2}
    qformer = {"use": "qformer", "queries": 3, "width": 16, "depth": 3, "heads": 2, "cross_every": 2, "words": True}
    return {
        "streams": {
            "image": {"modality": "image", "encoder": image, "connector": qformer, "enters": "sequence"},
            "words": {
                "modality": "text", "encoder": {"use": "embedding", "width": 16}, "enters": "beside_queries",
            },
        },
        "backbone": {"use": "decoder", "max_tokens": 64, "transformer": {"width": 24, "depth": 1, "heads": 2}},
        "heads": HEADS,
        **changes,
    }  # fmt: skip


def pair(index: int, *names: str, label: str | None = None) -> Sample:
    views: dict[str, Part] = {"image": medium("image", index), "text": Text(TEXTS[index % 4])}
    return Sample(f"p{index}", views={name: views[name] for name in names or views}, label=label)


PAIRS = [pair(index) for index in range(4)]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return build(data())


def query_run(toy: Toy, batch: Batch) -> QueryRun:
    features = {name: toy.network.encode(name, stream) for name, stream in batch.streams.items()}
    return QueryRun(toy.network, batch, features)


@pytest.fixture
def qformer() -> QFormer:
    torch.manual_seed(0)
    built = QFormerConfig.parse({"queries": 3, "width": 16, "depth": 3, "heads": 2, "words": True}).build(12, None)
    assert isinstance(built, QFormer)
    return built.eval()


def given(seed: int = 0) -> tuple[Memory, torch.Tensor, torch.Tensor]:
    """Features, embedded words and which are valid, of two pairs; the second has two words."""
    generator = torch.Generator().manual_seed(seed)
    x_UND, words_ULD = (torch.randn(2, count, width, generator=generator) for count, width in ((5, 12), (4, 16)))
    return Memory(x_UND), words_ULD, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


def changed(x: torch.Tensor, y: torch.Tensor) -> list[bool]:
    """Which places of row 0 differ."""
    return ((x[0] - y[0]).abs().amax(-1) > 1e-5).tolist()


@torch.no_grad()
def test_a_word_changes_the_queries_under_the_mask_of_matching_alone(qformer: QFormer) -> None:
    memory, words, valid = given()
    other = words.clone()
    other[0, 1] *= -1
    for causal, reaches_queries in ((False, True), (True, False)):
        one = qformer.read(memory, (words, valid), causal=causal)
        two = qformer.read(memory, (other, valid), causal=causal)
        assert changed(one[0], two[0]) == [reaches_queries] * 3
        assert changed(one[1], two[1]) == ([True] * 4 if not causal else [False, True, True, True])
    alone, none = qformer.read(memory)
    torch.testing.assert_close(qformer.read(memory, (words, valid), causal=True)[0], alone)
    assert none.shape == (2, 0, 16) and torch.equal(alone, qformer.states(memory.x_BMC, torch.ones(2, 5).bool()))


@torch.no_grad()
def test_words_see_the_picture_through_the_queries_unless_they_stand_alone(qformer: QFormer) -> None:
    memory, words, valid = given()
    other = Memory(memory.x_BMC * -1)
    for causal in (False, True):
        one, two = (qformer.read(each, (words, valid), causal=causal)[1] for each in (memory, other))
        # The queries look at the picture in the first block, so words know of it from the second on.
        assert changed(one, two) == [True] * 4
    queries, alone = qformer.read(None, (words, valid))
    assert queries.shape == (2, 0, 16)
    changed_word = words.clone()
    changed_word[0, 3] *= -1
    assert changed(alone, qformer.read(None, (changed_word, valid))[1]) == [True] * 4, "alone, words see each other"


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(qformer: QFormer, causal: bool) -> None:
    memory, words, valid = given()
    queries, states = qformer.read(memory, (words, valid), causal=causal)
    short = qformer.read(Memory(memory.x_BMC[1:]), (words[1:, :2], valid[1:, :2]), causal=causal)
    torch.testing.assert_close(queries[1:], short[0])
    torch.testing.assert_close(states[1:, :2], short[1])


@torch.no_grad()
def test_contrast_is_between_the_best_query_and_the_first_word(toy: Toy) -> None:
    batch = toy.batch(PAIRS)
    run = query_run(toy, batch)
    outputs = toy.network(batch, ("embed",))
    head = toy.network.heads["space"]
    (queries, owners), (texts, _) = outputs.embeddings["image"], outputs.embeddings["words"]
    assert queries.shape == (4, 3, 8) and texts.shape == (4, 8) and owners.tolist() == [0, 1, 2, 3]
    features = run.features["image"]
    states = run.qformer.states(features.x_UND, features.is_valid_UN)
    torch.testing.assert_close(queries, F.normalize(head.projs["image"](states), dim=-1))
    scores = torch.tensor([[max(float(q @ t) for q in picture) for t in texts] for picture in queries])
    logits, own = outputs.scale * scores, torch.arange(4)
    plain = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(InfoNCE()(outputs, batch).total, plain)
    turned = InfoNCE.parse({"pairs": [["words", "image"]]})(outputs, batch).total
    torch.testing.assert_close(turned, plain)


@torch.no_grad()
def test_a_vector_depends_on_its_own_item_alone(toy: Toy) -> None:
    together = toy.network(toy.batch(PAIRS), ("embed",)).embeddings
    for name, view in (("image", "image"), ("words", "text")):
        vectors = toy.network(toy.batch([pair(2, view)]), ("embed",)).embeddings
        assert list(vectors) == [name]
        torch.testing.assert_close(vectors[name][0], together[name][0][2:3])


@torch.no_grad()
def test_matching_averages_the_logits_of_the_queries(toy: Toy) -> None:
    batch = toy.batch(PAIRS)
    run = query_run(toy, batch)
    image, words = run.features["image"], run.features["words"]
    states, _ = run.qformer.read(Memory(image.x_UND), (words.x_UND, words.is_valid_UN))
    head = toy.network.heads["match"]
    two = head.scores(states).mean(1)
    torch.testing.assert_close(toy.network(batch, ("merge",)).match_logits, two[:, 1] - two[:, 0])
    assert not torch.allclose(head.scores(states)[:, 0], head.scores(states)[:, 1]), "queries must differ"


@torch.no_grad()
def test_matching_is_learned_from_pairs_and_their_hard_negatives(toy: Toy) -> None:
    batch = toy.batch(PAIRS)
    torch.manual_seed(3)
    outputs = toy.network(batch, ("match_hard",))
    # Each picture with another's text and each text with another's picture, beside the pair itself.
    assert sorted(outputs.mismatch_samples.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    logits = torch.cat([outputs.match_logits, outputs.mismatch_logits])
    targets = torch.tensor([1.0] * 4 + [0.0] * 8)
    two_classes = F.cross_entropy(torch.stack([torch.zeros(12), logits], 1), targets.long())
    torch.testing.assert_close(Matching.parse({"negatives": "hard"})(outputs, batch).total, two_classes)
    foreign = [crossed(i, j) for i in range(4) for j in range(4) if i != j]
    every_N = torch.cat([toy.network(toy.batch([sample]), ("merge",)).match_logits for sample in foreign])
    distance_N = (outputs.mismatch_logits[:, None] - every_N).abs().amin(1)
    assert distance_N.max() < 1e-5, "each negative is a picture with a foreign text"


def crossed(image: int, text: int) -> Sample:
    return Sample("x", views={"image": medium("image", image), "text": Text(TEXTS[text])})


def test_hard_negatives_are_chosen_by_the_best_query() -> None:
    tokens = {"image": torch.arange(3.0)[:, None, None], "words": torch.arange(3.0)[:, None, None] + 10}
    valid = {name: torch.ones(3, 1, dtype=torch.bool) for name in tokens}
    texts = torch.eye(3)
    # The best query of picture i is text i + 1; the mean over its queries would choose text i + 2.
    pictures = torch.stack([torch.stack([texts[(i + 1) % 3], -texts[(i + 1) % 3], texts[(i + 2) % 3] * 0.6])
                            for i in range(3)])  # fmt: skip
    owners = torch.arange(3)
    torch.manual_seed(0)
    embeddings = {"image": (pictures, owners), "words": (texts, owners)}
    mixed, _, samples = hard_mismatched(tokens, valid, embeddings, torch.arange(3))
    assert samples.tolist() == [0, 1, 2, 0, 1, 2]
    assert mixed["words"].flatten().tolist()[:3] == [11.0, 12.0, 10.0]
    assert mixed["image"].flatten().tolist()[3:] == [2.0, 0.0, 1.0]


@torch.no_grad()
def test_captions_are_written_word_by_word(toy: Toy) -> None:
    batch = toy.batch(PAIRS)
    outputs = toy.network(batch, (CAPTION,))
    head, losses = toy.network.heads["caption"], []
    for index in range(4):
        single = toy.batch([PAIRS[index]])
        run = query_run(toy, single)
        image, words, ids = run.features["image"], run.features["words"], single.streams["words"].values[0]
        for place in range(1, len(ids)):
            before = words.x_UND[:, :place], words.is_valid_UN[:, :place]
            _, states = run.qformer.read(Memory(image.x_UND), before, causal=True)
            losses.append(F.cross_entropy(head(states[:, -1]), ids[place : place + 1]))
    found = Caption.parse({"stream": "words"})(outputs, batch)
    assert found.count == len(losses)
    torch.testing.assert_close(found.total, torch.stack(losses).mean())


@pytest.mark.parametrize(("vectors", "same"), [(1, "negative"), (3, "negative"), (3, "skip"), (3, "positive")])
def test_contrast_of_several_vectors_is_its_definition(vectors: int, same: str) -> None:
    from polymodal.objectives.infonce import best_infonce, infonce
    from polymodal.objectives.pairing import Relation

    generator = torch.Generator().manual_seed(1)
    x, y = (F.normalize(torch.randn(5, *shape, generator=generator), dim=-1) for shape in ((vectors, 6), (6,)))
    x.requires_grad_(), y.requires_grad_()
    groups = [0, 1, 0, 2, 3]
    relation = Relation(torch.tensor(groups), same)  # type: ignore[arg-type]
    loss = best_infonce(x, y, torch.tensor(4.0), relation)
    score = [[4.0 * max(float(a @ b) for a in own) for b in y] for own in x]
    terms = []
    for i in range(5):
        for table in (score, [list(column) for column in zip(*score, strict=True)]):
            alike = [j for j in range(5) if groups[j] == groups[i]]
            right = alike if same == "positive" else [i]
            rivals = [j for j in range(5) if j == i or same != "skip" or j not in alike]
            total = math.log(sum(math.exp(table[i][j]) for j in rivals))
            terms.append(total - sum(table[i][j] for j in right) / len(right))
    torch.testing.assert_close(float(loss.detach()), sum(terms) / 10, rtol=1e-5, atol=1e-5)
    if vectors == 1:
        single = x.detach()[:, 0].requires_grad_()
        torch.testing.assert_close(infonce(single, y, torch.tensor(4.0), relation), loss)
        assert torch.autograd.grad(loss, y)[0].abs().sum() > 0


def reached(toy: Toy, *losses: torch.Tensor) -> set[str]:
    """Names of the parameters that get a gradient that is not zero."""
    toy.network.zero_grad()
    sum(losses).backward()  # type: ignore[union-attr]
    return {n for n, p in toy.network.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def test_gradients_reach_what_each_stage_trains_and_nothing_else() -> None:
    toy = build(data())
    network, batch = toy.network, toy.batch(PAIRS)
    network.requires_grad_(True)
    network.streams["image"].encoder.requires_grad_(False)
    torch.manual_seed(0)
    outputs = network(batch, ("embed", "match_hard", CAPTION))
    objectives = (InfoNCE(), Matching.parse({"negatives": "hard"}), Caption.parse({"stream": "words"}))
    first = reached(toy, *(objective(outputs, batch).total for objective in objectives))
    connector = "streams.image.connector."
    expected = {n for n, _ in network.named_parameters() if n.startswith((connector, "streams.words.", "heads."))}
    outside = {n for n in expected if n.startswith((connector + "out.", "heads.answer."))} | {"heads.space.bias"}
    # A bias of keys shifts all scores of a query alike and changes nothing.
    assert all(name.endswith("k_proj.bias") for name in expected - outside - first)
    assert first <= expected - outside
    network.requires_grad_(False)
    network.streams["image"].connector.requires_grad_(True)
    told = network(toy.batch([asked(0, "image")]), ("sequence",))
    second = reached(toy, F.cross_entropy(told.token_logits, told.token_targets))
    assert {name.split(".")[3] for name in second} == {"queries", "query_norm", "transformer", "out"}
    assert all(name.startswith(connector) for name in second)


@torch.no_grad()
def test_the_second_stage_reads_the_same_queries_and_no_text(toy: Toy) -> None:
    batch = toy.batch([asked(0, "image"), asked(1)])
    assert "words" not in batch.streams
    stream = batch.streams["image"]
    features = toy.network.encode("image", stream)
    qformer = toy.network.streams["image"].connector
    soft = toy.network.embed_sequence(batch).flatten(0, 1)[stream.token_index]
    torch.testing.assert_close(soft, qformer.out(qformer.read(Memory(features.x_UND))[0])[0])


@torch.no_grad()
def test_absent_views_leave_the_others_as_they_are(toy: Toy) -> None:
    torch.manual_seed(0)
    outputs = toy.network(toy.batch([pair(0), pair(1, "image"), pair(2, "text"), pair(3)]), ("match_hard", CAPTION))
    assert set(outputs.mismatch_samples.tolist()) <= {0, 1, 2, 3} and outputs.match_logits.isfinite().all()
    torch.testing.assert_close(
        outputs.match_logits[[0, 3]], toy.network(toy.batch([pair(0), pair(3)]), ("merge",)).match_logits
    )
    assert set(outputs.tokens[CAPTION].samples.tolist()) <= {0, 2, 3}
    blind = toy.network(toy.batch([pair(1, "image")]), ("match_hard", CAPTION))
    assert len(blind.mismatch_samples) == 0 and blind.tokens[CAPTION].predictions is None


def test_a_model_without_a_language_model_has_no_map_to_one() -> None:
    config = data(backbone="none", heads={name: HEADS[name] for name in ("space", "match", "caption")})
    del config["streams"]["image"]["enters"]
    toy = build(config)
    assert toy.network.streams["image"].connector.out is None
    assert supports(toy.config) >= {"embed", "merge", "match", "match_hard", "caption"}
    with torch.no_grad():
        assert toy.network(toy.batch(PAIRS), ("match_hard", CAPTION)).match_logits.shape == (4,)


def heads(**changed: Any) -> dict[str, Any]:
    return {"heads": {**HEADS, **changed}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            heads(caption={"use": "masked_token", "stream": "image", "at": "queries"}),
            "tokens of the stream 'image', expe",
        ),
        (
            {"streams": {"image": data()["streams"]["image"]}, "heads": {"answer": {"use": "next_token"}}},
            r"found connectors that read words in \['image'\] and words in \[\], expected one text stream",
        ),
        (
            {"backbone": {"use": "encoder"}, "heads": {}},
            "enters by 'beside_queries', which needs the backbone 'decoder'",
        ),
    ],
)
def test_models_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse(data(**changes))


def test_heads_at_queries_need_a_qformer_that_reads() -> None:
    plain = data(heads={"answer": {"use": "next_token"}, "match": {"use": "matching", "at": "queries"}})
    plain["streams"]["image"]["connector"]["words"] = False
    del plain["streams"]["words"]
    with pytest.raises(ConfigError, match=r"heads.match: stands at 'queries', expected one stream whose connector"):
        ModelConfig.parse(plain)


def test_losses_that_take_one_vector_name_the_one_that_does(toy: Toy) -> None:
    from polymodal.objectives.sigmoid_pairs import SigmoidPairs

    batch = toy.batch(PAIRS)
    outputs = toy.network(batch, ("embed",))
    with pytest.raises(ConfigError, match=r"found vectors of shape \[4, 3, 8\] and \[4, 8\].*'infonce' takes several"):
        SigmoidPairs()(outputs, batch)


def test_generated_texts_are_not_masked(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="found a head at 'queries', where texts are generated; use 'caption'"):
        toy.network(toy.batch(PAIRS), (TokenPass("masked", "", (("words", 0.3),)),))
