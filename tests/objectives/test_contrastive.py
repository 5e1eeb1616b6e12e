"""InfoNCE, sigmoid pairs and triplets: equal to the dense formulas, in value and gradient, for every chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from polymodal.core.errors import ConfigError
from polymodal.objectives.infonce import InfoNCE, infonce
from polymodal.objectives.pairing import Relation, pair_streams
from polymodal.objectives.sigmoid_pairs import SigmoidPairs, sigmoid_pairs
from polymodal.objectives.triplet import Triplet, triplet

from .samples import batch_of, embedded, unit_vectors

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 3])
CHUNKS = [1, 3, 7, 100]
SAME = ["negative", "skip", "positive"]


def masks(same: str) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.eye(7, dtype=torch.bool)
    together = GROUPS[:, None] == GROUPS[None, :]
    if same == "negative":
        return own, ~own
    return (own if same == "skip" else together), ~together


def dense_infonce(x, y, scale, same):
    positive, negative = masks(same)
    logits = (scale * x @ y.T).masked_fill(~(positive | negative), float("-inf"))
    losses = []
    for scores in (logits, logits.T):
        log_p = scores.log_softmax(1).masked_fill(~positive, 0.0)
        losses.append((-log_p.sum(1) / positive.sum(1)).mean())
    return sum(losses) / 2


def dense_sigmoid(x, y, scale, bias, same):
    positive, negative = masks(same)
    logits = scale * x @ y.T + bias
    return (-F.logsigmoid(logits)[positive].sum() - F.logsigmoid(-logits)[negative].sum()) / len(x)


def dense_triplet(x, y, margin, negatives, same):
    _, negative = masks(same)
    cosine = x @ y.T
    losses = (margin - cosine.diagonal()[:, None] + cosine).clamp_min(0) * negative
    if negatives == "hardest":
        return losses.max(1).values.mean()
    return (losses.sum(1) / negative.sum(1)).mean()


def inputs():
    leaves = [unit_vectors(7, seed=1), unit_vectors(7, seed=2)]
    leaves += [torch.tensor(4.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)]
    return [leaf.requires_grad_() for leaf in leaves]


def assert_same(ours, dense, ours_leaves, dense_leaves):
    torch.testing.assert_close(ours, dense)
    (3 * ours).backward()
    (3 * dense).backward()
    for left, right in zip(ours_leaves, dense_leaves, strict=True):
        torch.testing.assert_close(left.grad, right.grad)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("same", SAME)
def test_chunked_infonce_equals_dense(chunk, same):
    a, b = inputs()[:3], inputs()[:3]
    assert_same(infonce(*a, Relation(GROUPS, same), chunk), dense_infonce(*b, same), a, b)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("same", SAME)
def test_chunked_sigmoid_pairs_equal_dense(chunk, same):
    a, b = inputs(), inputs()
    assert_same(sigmoid_pairs(*a, Relation(GROUPS, same), chunk), dense_sigmoid(*b, same), a, b)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("same", SAME[:2])
@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_chunked_triplet_equals_dense(chunk, same, negatives):
    a, b = inputs()[:2], inputs()[:2]
    ours = triplet(*a, 0.5, negatives, Relation(GROUPS, same), chunk)
    assert_same(ours, dense_triplet(*b, 0.5, negatives, same), a, b)


def test_infonce_is_the_cross_entropy_of_the_clip_paper():
    x, y, scale = (leaf.detach() for leaf in inputs()[:3])
    logits, target = scale * x @ y.T, torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(infonce(x, y, scale, Relation(GROUPS)), expected)


def test_infonce_gradient_by_finite_differences():
    leaves = inputs()[:3]
    assert torch.autograd.gradcheck(lambda *a: infonce(*a, Relation(GROUPS, "positive"), 3), leaves)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_memory_does_not_grow_with_the_batch_squared(loss):
    """The largest tensor that the graph keeps is the vectors themselves, not a matrix of all pairs."""
    size = 256
    x = unit_vectors(size, 4, 1).float().requires_grad_()
    y = unit_vectors(size, 4, 2).float().requires_grad_()
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    relation = Relation(torch.arange(size))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if loss == "infonce":
            infonce(x, y, torch.tensor(2.0), relation, 16)
        else:
            sigmoid_pairs(x, y, torch.tensor(2.0), torch.tensor(0.0), relation, 16)
    assert max(kept, default=0) <= size * 16


def test_half_precision_vectors_are_scored_in_float32_even_under_autocast():
    x, y = unit_vectors(7, seed=1).float(), unit_vectors(7, seed=2).float()
    plain = infonce(x, y, torch.tensor(20.0), Relation(GROUPS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(infonce(x, y, torch.tensor(20.0), Relation(GROUPS)), plain)
        assert sigmoid_pairs(x, y, torch.tensor(2.0), torch.tensor(0.0), Relation(GROUPS)).dtype == torch.float32
    assert infonce(x.bfloat16(), y.bfloat16(), torch.tensor(20.0), Relation(GROUPS)).dtype == torch.float32


def test_pairs_are_made_by_sample_and_the_first_item_counts():
    outputs = embedded(2)
    vectors = unit_vectors(3)
    outputs.embeddings["image"] = (vectors, torch.tensor([0, 0, 2]))
    outputs.embeddings["text"] = (unit_vectors(3, seed=5), torch.tensor([2, 1, 0]))
    pair = pair_streams(outputs, "image", "text")
    assert pair.samples_B.tolist() == [0, 2]
    assert torch.equal(pair.x_BD, vectors[[0, 2]])
    assert torch.equal(pair.y_BD, outputs.embeddings["text"][0][[2, 0]])
    assert pair_streams(outputs, "image", "audio") is None
    outputs.embeddings["audio"] = (vectors[:1], torch.tensor([1]))
    assert pair_streams(outputs, "image", "audio") is None


@pytest.mark.parametrize("config", [InfoNCE(), SigmoidPairs(), Triplet()])
def test_order_of_samples_does_not_matter(config):
    outputs, order = embedded(5), torch.tensor([3, 0, 4, 1, 2])
    one = config(outputs, batch_of(5))
    for name, (vectors, owners) in outputs.embeddings.items():
        outputs.embeddings[name] = (vectors[order], owners)
    torch.testing.assert_close(config(outputs, batch_of(5)).total, one.total)


def test_several_pairs_are_averaged_and_reported_apart():
    outputs = embedded(4)
    outputs.embeddings["audio"] = (unit_vectors(3, seed=7), torch.tensor([0, 1, 3]))
    report = InfoNCE(pairs=[["image", "text"], ["image", "audio"]])(outputs, batch_of(4))
    assert set(report.parts) == {"image-text", "image-audio"}
    assert report.count == 7
    torch.testing.assert_close(report.total, torch.stack(list(report.parts.values())).mean())
    assert set(InfoNCE()(outputs, batch_of(4)).parts) == {"audio-image", "audio-text", "image-text"}


def test_an_absent_stream_counts_nothing_and_has_no_graph():
    outputs = embedded(4)
    report = InfoNCE(pairs=[["image", "audio"]])(outputs, batch_of(4))
    assert (report.count, report.parts, report.total.requires_grad) == (0, {}, False)
    assert InfoNCE()(embedded(1), batch_of(1)).count == 0, "one pair alone has no negative"
    assert SigmoidPairs()(embedded(1), batch_of(1)).count == 1


@pytest.mark.parametrize("config", [InfoNCE(same_label="skip"), SigmoidPairs(same_label="skip")])
def test_samples_that_share_a_label_are_not_negatives(config):
    """Moving a same-label sample towards the anchor changes nothing when it is skipped."""
    labels = ["cat", "cat", None, None]
    outputs = embedded(4)
    loss = config(outputs, batch_of(4, labels)).total
    apart = config(outputs, batch_of(4)).total
    assert loss < apart
    all_different = config(outputs, batch_of(4, ["a", "b", "c", "d"])).total
    torch.testing.assert_close(all_different, apart)


def test_a_fixed_temperature_needs_no_scale():
    outputs = embedded(4, scale=10.0)
    learned = InfoNCE()(outputs, batch_of(4)).total
    outputs.scale = None
    torch.testing.assert_close(InfoNCE(temperature=0.1)(outputs, batch_of(4)).total, learned)


def test_messages():
    outputs = embedded(3)
    outputs.scale = outputs.bias = None
    with pytest.raises(ConfigError, match="objective infonce: the outputs have no scale; add a projection head"):
        InfoNCE()(outputs, batch_of(3))
    outputs.scale = torch.tensor(1.0)
    with pytest.raises(ConfigError, match="sigmoid_pairs: the outputs have no bias; add a projection head with a bias"):
        SigmoidPairs()(outputs, batch_of(3))
    with pytest.raises(ConfigError, match=r"the pair \[a, a\] names one stream twice, expected two streams"):
        InfoNCE.parse({"pairs": [["a", "a"]]}, "objectives.infonce")
    with pytest.raises(ConfigError, match=r"the pair \[b, a\] stands there twice"):
        InfoNCE.parse({"pairs": [["a", "b"], ["b", "a"]]})
    with pytest.raises(ConfigError, match="triplet has one positive per anchor; expected 'negative' or 'skip'"):
        Triplet.parse({"same_label": "positive"})


def test_streams_are_known_before_a_batch_is_seen():
    assert InfoNCE(pairs=[["image", "text"], ["image", "audio"]]).streams == ("image", "text", "audio")
