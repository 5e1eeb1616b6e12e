"""Cached features: the same training without the encoder's work, and never features of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import torch

from polymodal.core.errors import ConfigError, DataError
from polymodal.data.loader import Loader
from polymodal.data.quarantine import Quarantine
from polymodal.models.compose import to_device
from polymodal.recipes.assemble import Assembly, assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.run import stage_sources, train
from polymodal.training import features as module
from polymodal.training.features import FeatureStore, frozen_streams, stream_tag
from polymodal.training.freezing import apply_train
from polymodal.training.metrics_log import read_metrics
from polymodal.training.precision import ComputeConfig

CPU = ComputeConfig(device="cpu").resolve()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_recipes.write_data(tmp_path / "data", num=12)


def assembled(root: Path, **stage: Any) -> Assembly:
    parts = assemble(load_recipe(small_recipes.decoder_recipe(root, small_recipes.stage(**stage))))
    apply_train(parts.network, parts.recipe.stages[0].train)
    return parts


def store_of(parts: Assembly, folder: Path) -> FeatureStore:
    return FeatureStore(folder, parts.network, parts.processor, CPU)


def sources_of(parts: Assembly) -> Any:
    return stage_sources(parts.recipe, parts.recipe.stages[0])


@pytest.mark.parametrize("budget", [None, "recipe", "stream"])
def test_training_on_cached_features_gives_the_same_losses(budget: str | None, root: Path, tmp_path: Path) -> None:
    logs = []
    for cache in (False, True):
        recipe = small_recipes.decoder_recipe(root, small_recipes.stage(steps=6, cache_features=cache))
        if budget == "recipe":
            recipe["tokens"] = 2
        elif budget == "stream":
            recipe["model"]["streams"]["image"]["tokens"] = 2
        out = tmp_path / str(cache)
        train(load_recipe(recipe), out, quiet=True)
        logs.append(read_metrics(out / "stages/00-tune/metrics.jsonl"))
    for plain, cached in zip(*logs, strict=True):
        assert cached == pytest.approx(plain, rel=1e-5)
    assert (tmp_path / "True/features").is_dir() and not (tmp_path / "False/features").exists()


def test_samples_are_laid_out_as_without_the_cache(root: Path, tmp_path: Path) -> None:
    parts = assembled(root)
    parts.processor.has_source, parts.processor.tokens = True, 7
    with store_of(parts, tmp_path / "cache") as store:
        found, right = vars(store.processor), vars(parts.processor)
        assert {name for name in right if found[name] != right[name]} == {"streams"}


def test_cached_features_are_the_encoders_own(root: Path, tmp_path: Path) -> None:
    parts = assembled(root)
    with store_of(parts, tmp_path / "cache") as store:
        store.fill(sources_of(parts))
        stage = parts.recipe.stages[0]
        plain = next(iter(Loader(sources_of(parts), None, parts.processor, stage.batch)))
        cached = next(iter(Loader(sources_of(parts), None, store.processor, stage.batch, cache=store)))
        assert cached.sample_ids == plain.sample_ids
        assert all(stream.values is None for stream in cached.streams.values()), "nothing was decoded"
        store.attach(cached)
        parts.network.eval()
        with torch.no_grad():
            right, found = (parts.network(to_device(batch, "cpu")).token_logits for batch in (plain, cached))
    assert torch.allclose(found, right, atol=1e-6)


def test_every_item_is_encoded_once_and_kept(root: Path, tmp_path: Path) -> None:
    parts = assembled(root)
    seen = []
    with store_of(parts, tmp_path / "cache") as store:
        assert store.fill(sources_of(parts), lambda done, total: seen.append((done, total))) == 24
        assert store.fill(sources_of(parts)) == 0
        assert store.fill([*sources_of(parts), *sources_of(parts)]) == 0
    assert seen == [(done, 24) for done in range(1, 25)]
    with store_of(parts, tmp_path / "cache") as store:
        assert store.fill(sources_of(parts)) == 0, "another process finds them again"


def test_a_picture_asked_about_many_times_is_planned_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = assembled(root)
    sources = sources_of(parts)
    with store_of(parts, tmp_path / "cache") as store:
        plan = store.processor.plan
        planned: list[str] = []
        monkeypatch.setattr(store.processor, "plan", lambda sample: planned.append(sample.id) or plan(sample))
        assert store.fill([*sources, *sources, *sources]) == 24
    assert len(planned) == len(set(planned)) == 24


def test_a_new_encoder_or_reader_never_reads_the_old_ones_features(root: Path) -> None:
    parts = assembled(root)
    tags = {name: stream_tag(parts.network, name) for name in ("image", "sensor")}
    assert stream_tag(assembled(root).network, "image") == tags["image"], "the same model gives the same tag"
    with torch.no_grad():
        next(parts.network.get_submodule("streams.image.encoder").parameters()).add_(1e-3)
    assert stream_tag(parts.network, "image") != tags["image"]
    assert stream_tag(parts.network, "sensor") == tags["sensor"]
    recipe = small_recipes.decoder_recipe(root)
    recipe["model"]["streams"]["image"]["reader"] = {"use": "image", "size_px": 16, "mean": [0.1, 0.1, 0.1]}
    other = assemble(load_recipe(recipe))
    assert stream_tag(other.network, "image") != tags["image"]


def test_only_encoders_that_do_not_train_are_cached(root: Path, tmp_path: Path) -> None:
    parts = assembled(root, train=["streams.image", "backbone"])
    assert frozen_streams(parts.network) == ["sensor"]
    every = small_recipes.stage(train=["streams", "backbone"], cache_features=True)
    with pytest.raises(ConfigError, match=r"stages.tune.cache_features: every encoder .* trains .* set it to false"):
        train(load_recipe(small_recipes.decoder_recipe(root, every)), tmp_path / "run", quiet=True)


def test_a_damaged_record_is_encoded_again(root: Path, tmp_path: Path) -> None:
    parts = assembled(root)
    with store_of(parts, tmp_path / "cache") as store:
        store.fill(sources_of(parts))
    for file in (tmp_path / "cache").glob("*/features.bin"):
        content = bytearray(file.read_bytes())
        content[10] ^= 0xFF
        file.write_bytes(content)
    with store_of(parts, tmp_path / "cache") as store:
        assert store.fill(sources_of(parts)) == 2, "one of each stream"
        stage = parts.recipe.stages[0]
        batch = next(iter(Loader(sources_of(parts), None, store.processor, stage.batch, cache=store)))
        store.attach(batch)
        assert all(np.isfinite(stream.features[0]).all() for stream in batch.streams.values() if stream.features)


def test_items_that_the_cache_lost_since_it_was_filled_are_named(root: Path, tmp_path: Path) -> None:
    parts = assembled(root)
    with store_of(parts, tmp_path / "cache") as store:
        store.fill(sources_of(parts))
        batch = next(iter(Loader(sources_of(parts), None, store.processor, parts.recipe.stages[0].batch, cache=store)))
        stream = batch.streams["image"]
        stream.keys[0] = stream.keys[0][:-4] + "0000"
        with pytest.raises(DataError, match=rf"lacks 1 of {len(stream.keys)} items of a batch.*run the same command"):
            store.attach(batch)


def test_corrupt_media_are_passed_over_and_the_loader_names_them(root: Path, tmp_path: Path) -> None:
    content = bytearray((root / "3.png").read_bytes())
    content[60:90] = bytes(30)
    (root / "3.png").write_bytes(content)
    (root / "5.npy").unlink()
    (root / "7.png").write_bytes(b"")
    parts = assembled(root)
    quarantine = Quarantine(max_rate=0.5)
    with store_of(parts, tmp_path / "cache") as store:
        assert store.fill(sources_of(parts)) == 21
        stage = parts.recipe.stages[0]
        with Loader(
            sources_of(parts), None, store.processor, stage.batch, cache=store, quarantine=quarantine, once=True
        ) as loader:
            ids = []
            for batch in loader:
                store.attach(batch)
                ids += batch.sample_ids
    assert len(ids) == 21 and not {"c3", "c7", "q5"} & set(ids)
    assert quarantine.num_failed == 3


def test_a_group_cut_short_is_encoded_again_whole(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is encoded together never depends on what is stored: or a kill would change the last bits of features."""
    monkeypatch.setattr(module, "ITEMS_PER_GROUP", 4)
    parts = assembled(root)
    calls: list[list[int]] = []
    encode = FeatureStore._encode

    def watched(self: FeatureStore, name: str, inputs: Any) -> Any:
        calls.append([len(inputs), sum(sum(item.lengths) for item in inputs)])
        return encode(self, name, inputs)

    monkeypatch.setattr(FeatureStore, "_encode", watched)
    with store_of(parts, tmp_path / "a") as store:
        store.fill(sources_of(parts))
    whole, calls[:] = list(calls), []
    with store_of(parts, tmp_path / "b") as store:
        cache = next(iter(store._caches.values()))
        put, count = cache.put, [0]

        def die(*args: Any) -> bool:
            count[0] += 1
            if count[0] == 7:
                raise KeyboardInterrupt
            return put(*args)

        monkeypatch.setattr(cache, "put", die)
        with pytest.raises(KeyboardInterrupt):
            store.fill(sources_of(parts))
    calls[:] = []
    with store_of(parts, tmp_path / "b") as store:
        assert store.fill(sources_of(parts)) == 18
    assert calls == whole[1:], "the first group was complete, the second is encoded whole again"
