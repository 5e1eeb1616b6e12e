"""A model is told from others by what its answers follow from."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_recipes
import torch

import polymodal as pm
from polymodal.recipes.assemble import assemble
from polymodal.recipes.evaluation import fingerprint
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.model import Model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipes.write_data(tmp_path_factory.mktemp("data"), num=12)


def model(root: Path, *overrides: str) -> Model:
    recipe = small_recipes.decoder_recipe(root, small_recipes.stage(steps=1))
    return Model(assemble(load_recipe(recipe, overrides)))


def test_equal_models_have_one_fingerprint(root: Path) -> None:
    assert fingerprint(model(root)) == fingerprint(model(root))
    other = model(root)
    with torch.no_grad():
        next(other.network.parameters()).view(-1)[0] += 1
    others = [other, model(root, "model.backbone.max_tokens=500"), model(root, "model.tokenizer.vocab_size=300")]
    assert len({fingerprint(each) for each in (model(root), *others)}) == 4


def test_fewer_bits_are_another_model(root: Path) -> None:
    pytest.importorskip("torchao")
    from polymodal.inference.quantised import quantise

    found = [model(root) for _ in range(3)]
    quantise(found[1].network, "int8")
    quantise(found[2].network, "int8")
    first, second, third = (fingerprint(each) for each in found)
    assert first != second == third


def test_an_interrupted_evaluation_of_a_model_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"use": "questions", "data": str(root / "questions.jsonl"), "max_new_tokens": 2, "batch_size": 5}
    stored, asked = tmp_path / "p.jsonl", list[int]()
    answer = Model.answer

    def counted(self: Model, samples: list[pm.Sample], max_new_tokens: int) -> list[str]:
        asked.append(len(samples))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(self, samples, max_new_tokens)

    monkeypatch.setattr(Model, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        pm.evaluate(model(root), task, predictions=stored)
    report = pm.evaluate(model(root), task, predictions=stored)
    assert asked[:4] == [5, 5, 2, 2] and report.overall.score.n == 12
    assert sum(asked) - 2 == sum(asked[3:]) + 10
