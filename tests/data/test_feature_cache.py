import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from polymodal.core.errors import DataError
from polymodal.data.feature_cache import FeatureCache


def item(seed=0, units=2, num=3, width=4, pooled=5):
    random = np.random.default_rng(seed)
    x = random.normal(size=(units, num, width)).astype(np.float32)
    is_valid = np.ones((units, num), dtype=bool)
    is_valid[-1, -1] = False
    x[~is_valid] = 0
    return x, is_valid, random.normal(size=(units, pooled)).astype(np.float32) if pooled else None


def assert_same(found, expected, tolerance=0.0):
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_what_was_put_is_read(tmp_path, storage, tolerance):
    items = {f"key {i}": item(i, units=1 + i, num=3 + i, pooled=5 * (i % 2)) for i in range(5)}
    with FeatureCache(tmp_path, "vit-b", storage=storage) as cache:
        for key, arrays in items.items():
            assert key not in cache
            assert cache.put(key, *arrays)
            assert_same(cache.get(key), arrays, tolerance)
        assert cache.get("other") is None
    with FeatureCache(tmp_path, "vit-b", storage=storage, writable=False) as cache:
        assert len(cache) == 5
        for key, arrays in items.items():
            assert key in cache
            assert_same(cache.get(key), arrays, tolerance)


def test_bfloat16_rounds_to_nearest_even(tmp_path):
    values = np.asarray([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 1e30, 0.0], dtype=np.float32)[None, None]
    with FeatureCache(tmp_path, "v", storage="bfloat16") as cache:
        cache.put("k", values, np.ones((1, 1), dtype=bool))
        found = cache.get("k").x_UND[0, 0]
    assert found[:4].tolist() == [1.0, 1.0, 1 + 2**-6, -2.5]
    assert abs(found[4] / 1e30 - 1) < 2**-8


def test_float32_is_read_without_a_copy_and_outlives_the_cache(tmp_path):
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        cache.put("k", *item())
        found = cache.get("k")
        assert not found.x_UND.flags.owndata
        assert not found.x_UND.flags.writeable
    assert_same(found, item())


def test_padding_is_stored_as_zero(tmp_path):
    x, is_valid, _ = item()
    dirty = x.copy()
    dirty[~is_valid] = np.nan
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        cache.put("k", dirty, is_valid)
        assert_same(cache.get("k"), (x, is_valid, None))


def tiny(seed):
    return item(seed, units=1, num=2, width=2, pooled=1)


def filled(tmp_path):
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        cache.put("a", *tiny(0))
        sizes = {name: (cache.folder / name).stat().st_size for name in ("features.bin", "index.bin")}
        cache.put("b", *tiny(1))
    return cache.folder, sizes


@pytest.mark.parametrize("name", ["features.bin", "index.bin"])
def test_a_write_torn_at_any_byte_costs_the_last_item_only(tmp_path, name):
    folder, sizes = filled(tmp_path)
    whole = {file: (folder / file).read_bytes() for file in sizes}
    for cut in range(sizes[name], len(whole[name])):
        for file, data in whole.items():
            (folder / file).write_bytes(data[:cut] if file == name else data)
        with FeatureCache(tmp_path, "v", storage="float32", writable=False) as reader:
            assert ("a" in reader, "b" in reader) == (True, False)
        with FeatureCache(tmp_path, "v", storage="float32") as cache:
            assert {file: (folder / file).stat().st_size for file in sizes} == sizes
            assert_same(cache.get("a"), tiny(0))
            cache.put("b", *tiny(1))
            assert_same(cache.get("b"), tiny(1))
        assert {file: (folder / file).read_bytes() for file in sizes} == whole


def test_any_flipped_bit_is_noticed(tmp_path):
    folder, sizes = filled(tmp_path)
    index = (folder / "index.bin").read_bytes()
    for place in range(sizes["index.bin"], len(index)):
        (folder / "index.bin").write_bytes(index[:place] + bytes([index[place] ^ 1]) + index[place + 1 :])
        with FeatureCache(tmp_path, "v", storage="float32", writable=False) as reader:
            assert ("a" in reader, "b" in reader) == (True, False)
    (folder / "index.bin").write_bytes(index)
    data = bytearray((folder / "features.bin").read_bytes())
    data[0] ^= 1
    (folder / "features.bin").write_bytes(data)
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        assert cache.get("a") is None
        assert "a" not in cache
        assert_same(cache.get("b"), tiny(1))
        cache.put("a", *tiny(0))
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        assert_same(cache.get("a"), tiny(0))


def test_a_failed_write_leaves_the_cache_usable(tmp_path, monkeypatch):
    import polymodal.data.feature_cache as module

    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        cache.put("a", *item(0))
        real = module._write_at

        def full_disk(file, offset, data):
            real(file, offset, data[: len(data) // 2])
            raise OSError("no space left on device")

        monkeypatch.setattr(module, "_write_at", full_disk)
        with pytest.raises(OSError, match="no space"):
            cache.put("b", *item(1))
        monkeypatch.undo()
        assert "b" not in cache
        assert cache.put("c", *item(2))
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        assert len(cache) == 2
        assert_same(cache.get("c"), item(2))


def test_the_size_limit_refuses_and_keeps(tmp_path):
    with FeatureCache(tmp_path, "v", storage="float32", max_bytes=400) as cache:
        stored = [cache.put(str(i), *item(i)) for i in range(5)]
        assert stored == [True, True, False, False, False]
        assert cache.num_bytes <= 400
        assert cache.put("0", *item(0))
        assert "0" in cache
        assert "2" not in cache


def test_one_writer_at_a_time(tmp_path):
    with FeatureCache(tmp_path, "v") as cache:
        cache.put("a", *item())
        with pytest.raises(DataError, match=r"another process is writing .* wait for it, or open with writable=False"):
            FeatureCache(tmp_path, "v")
        with FeatureCache(tmp_path, "v", writable=False) as reader:
            assert "a" in reader
        with FeatureCache(tmp_path, "other"):
            pass
    FeatureCache(tmp_path, "v").close()


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, numpy as np\n"
        "from polymodal.data.feature_cache import FeatureCache\n"
        f"cache = FeatureCache({str(tmp_path)!r}, 'v', storage='float32')\n"
        "cache.put('a', np.ones((1, 2, 3), np.float32), np.ones((1, 2), bool))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    with FeatureCache(tmp_path, "v", storage="float32") as cache:
        assert cache.get("a").x_UND.sum() == 6


def test_a_reader_takes_in_what_was_added(tmp_path):
    with FeatureCache(tmp_path, "v") as cache:
        cache.put("a", *item(0))
        with FeatureCache(tmp_path, "v", writable=False) as reader:
            assert reader.get("a") is not None
            cache.put("b", *item(1))
            assert "b" not in reader
            reader.refresh()
            assert_same(reader.get("b"), cache.get("b"))
            with pytest.raises(DataError, match="open for reading only; open it with writable=True"):
                reader.put("c", *item(2))


def test_many_threads_may_read_while_one_writes(tmp_path):
    problems = []
    with FeatureCache(tmp_path, "v", storage="float32") as cache:

        def read():
            for i in range(200):
                while str(i) not in cache:
                    pass
                try:
                    assert_same(cache.get(str(i)), item(i))
                except AssertionError as error:
                    problems.append(error)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(200):
            cache.put(str(i), *item(i))
        for thread in threads:
            thread.join()
    assert problems == []


def test_wrong_arrays_are_refused_by_key(tmp_path):
    x, is_valid, pooled = item()
    with FeatureCache(tmp_path, "v") as cache:
        for arrays in ((x[0], is_valid), (x, is_valid[:, :1]), (x[:, :0], is_valid[:, :0])):
            with pytest.raises(DataError, match=r"^k: found features .* expected \[U, N, D\]"):
                cache.put("k", *arrays)
        with pytest.raises(DataError, match=r"^k: .* expected pooled \[U, P\]"):
            cache.put("k", x, is_valid, pooled[:1])
        with pytest.raises(DataError, match=r"do not fit float16, .* 100000; store them as bfloat16 or float32"):
            cache.put("k", np.full_like(x, 1e5), is_valid)
        with pytest.raises(DataError, match="expected finite numbers"):
            cache.put("k", np.where(is_valid[..., None], np.nan, 0), is_valid)
        assert len(cache) == 0


def test_another_storage_type_is_refused(tmp_path):
    FeatureCache(tmp_path, "v").close()
    with pytest.raises(DataError, match=r"found .*float16.*, expected .*float32.*; ask for what is stored"):
        FeatureCache(tmp_path, "v", storage="float32")
    assert json.loads((tmp_path / "v" / "about.json").read_text()) == {"format": 1, "storage": "float16"}
    (tmp_path / "v" / "about.json").write_text("{")
    with pytest.raises(DataError, match="found something that is not JSON"):
        FeatureCache(tmp_path, "v")


def test_a_missing_cache_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="there is no feature cache; open it with writable=True"):
        FeatureCache(tmp_path, "v", writable=False)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_fingerprints_that_are_no_folder_names_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="fingerprint: found"):
        FeatureCache(tmp_path, name)
