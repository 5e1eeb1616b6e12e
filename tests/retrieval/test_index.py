import numpy as np
import pytest

from polymodal.core.errors import DataError
from polymodal.retrieval.index import FlatIndex, Signature

SIGNATURE = Signature(model="tiny", revision="abc", dim=8)


def filled(num: int = 50) -> tuple[FlatIndex, np.ndarray]:
    vectors = np.random.default_rng(0).normal(size=(num, 8)).astype(np.float32)
    index = FlatIndex(SIGNATURE)
    index.add([f"k{i}" for i in range(num)], vectors, [{"i": i} for i in range(num)])
    return index, vectors


def test_search_is_exact():
    index, vectors = filled()
    queries = np.random.default_rng(1).normal(size=(7, 8)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    for hits, row in zip(index.search(queries, k=10), cosine, strict=True):
        order = np.argsort(-row)[:10]
        assert [hit.key for hit in hits] == [f"k{i}" for i in order]
        assert [hit.note["i"] for hit in hits] == list(order)
        np.testing.assert_allclose([hit.score for hit in hits], row[order], atol=1e-6)


def test_k_beyond_the_entries_gives_all_of_them_and_an_empty_index_none():
    index, vectors = filled(3)
    assert len(index.search(vectors[0], k=10)[0]) == 3
    assert FlatIndex(SIGNATURE).search(vectors) == [[], [], []]


def test_ties_come_in_the_order_of_adding():
    index = FlatIndex(SIGNATURE)
    index.add([f"{i}" for i in range(20)], np.ones((20, 8), dtype=np.float32))
    assert [hit.key for hit in index.search(np.ones(8, dtype=np.float32), k=5)[0]] == ["0", "1", "2", "3", "4"]


def test_adding_a_key_again_replaces_it():
    index, vectors = filled(5)
    index.add(["k2", "k2"], np.stack([vectors[1], -vectors[0]]), [{"i": 0}, {"i": 99}])
    assert len(index) == 5
    best = index.search(-vectors[0], k=1)[0][0]
    assert (best.key, best.note) == ("k2", {"i": 99})


def test_remove():
    index, vectors = filled(5)
    assert index.remove(["k0", "k3", "nobody"]) == 2
    assert index.keys == ("k1", "k2", "k4")
    assert "k0" not in index
    assert index.search(vectors[4], k=1)[0][0].key == "k4"


def test_save_and_load(tmp_path):
    index, vectors = filled()
    path = index.save(tmp_path / "deep" / "index")
    assert path.name == "index.npz"
    again = FlatIndex.load(path, SIGNATURE)
    assert again.search(vectors, k=3) == index.search(vectors, k=3)
    assert [file.name for file in path.parent.iterdir()] == ["index.npz"]
    again.add(["new"], vectors[:1])
    assert len(again) == 51


def test_another_model_is_refused_everywhere(tmp_path):
    index, vectors = filled()
    other = Signature(model="tiny", revision="def", dim=8)
    path = index.save(tmp_path / "index.npz")
    for act in (
        lambda: index.add(["x"], vectors[:1], signature=other),
        lambda: index.search(vectors[:1], signature=other),
        lambda: FlatIndex.load(path, other),
    ):
        with pytest.raises(DataError, match=r"made by another model \(revision: index 'abc', given 'def'\).*Embed the"):
            act()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 7)), r"vectors: found shape \(2, 7\), expected \[N, 8\]"),
        (np.zeros((2, 8)), "row 0 is zero, NaN or infinite and has no direction; 2 such rows"),
        (np.full((2, 8), np.nan), "row 0 is zero, NaN"),
        (np.ones((3, 8)), "found 2 keys, 3 vectors and 2 notes"),
    ],
)
def test_wrong_vectors_are_refused(vectors, message):
    index = FlatIndex(SIGNATURE)
    with pytest.raises(DataError, match=message):
        index.add(["a", "b"], vectors)
    assert len(index) == 0


def test_k_below_one_is_refused():
    index, vectors = filled(3)
    with pytest.raises(DataError, match="k: found 0, expected at least 1"):
        index.search(vectors, k=0)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.npz: cannot be read: No such file"):
        FlatIndex.load(tmp_path / "none.npz")
    path = filled()[0].save(tmp_path / "index.npz")
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"index.npz: not a saved index, or damaged"):
            FlatIndex.load(path)
