"""Adapters in the hub's layout, both ways, against the reference library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_recipes
import torch
from models.presets.languages import byte_tokenizer
from safetensors.torch import load_file, save_file

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.parts import Image
from polymodal.inference.quantised import num_bytes
from polymodal.models.adapters import adapter_names, adapter_parameters, apply_adapter
from polymodal.models.adapters.lora import LoRAConfig
from polymodal.models.layers.layout import Layout
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.model import Model
from polymodal.recipes.run import train
from polymodal.recipes.run_adapters import export_run_adapters
from polymodal.recipes.run_folder import run_tokenizer
from polymodal.recipes.stored_models import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
IDS = torch.randint(0, 290, (1, 9), generator=torch.Generator().manual_seed(0))


def stirred(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_reference(kind: str, folder: Path) -> Path:
    """A small causal language model, saved by the reference library."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    stirred(model).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_reference(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "gpt2")}


def fresh(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def kinds(architecture: str) -> dict[str, Any]:
    is_llama = architecture == "llama"
    task = {"task_type": "CAUSAL_LM"}
    low = ["q_proj", "down_proj"] if is_llama else ["c_attn", "mlp.c_proj"]
    scaled, inner = (["k_proj", "v_proj"], ["down_proj"]) if is_llama else (["c_attn"], ["mlp.c_proj"])
    conv = {} if is_llama else {"fan_in_fan_out": True}
    return {
        "lora": peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=low, rank_pattern={low[1]: 3}, alpha_pattern={low[0]: 5}, **conv, **task
        ),
        "rslora": peft.LoraConfig(r=2, target_modules=low, use_rslora=True, **conv, **task),
        "dora": peft.LoraConfig(r=2, target_modules=low, use_dora=True, **conv, **task),
        "ia3": peft.IA3Config(target_modules=[*scaled, *inner], feedforward_modules=inner, **conv, **task),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
    }


def logits_of(model: Model, ids: torch.Tensor = IDS) -> Any:
    decoder = model.network.decoder
    layout = Layout.padded(None, causal=True, positions_BT=torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        return model.network.token_logits(decoder(decoder.embed(ids), layout))


def reference_logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3", "prompt", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_theirs_here_and_ours_there_compute_the_same(
    architecture: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[architecture]
    theirs = stirred(peft.get_peft_model(fresh(folder), kinds(architecture)[kind]))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(folder)
    plain = logits_of(model)
    layers = model.load_adapter(tmp_path / "theirs", "tone")
    adapted, expected = logits_of(model), reference_logits(theirs)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2
    model.export_adapter(tmp_path / "ours", "tone")
    again = peft.PeftModel.from_pretrained(fresh(folder), tmp_path / "ours").eval()
    torch.testing.assert_close(reference_logits(again), expected, rtol=1e-5, atol=1e-5)
    old, new = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    model.use_adapters([])
    assert torch.equal(logits_of(model), plain)
    model.use_adapters(["tone"])
    if kind in ("prompt", "prefix"):
        with pytest.raises(ConfigError, match="which no weight can stand in for"):
            model.merge()
    else:
        assert model.merge() == layers
        torch.testing.assert_close(logits_of(model), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stabilised", [False, True])
def test_what_the_hub_fuses_is_joined_block_by_block(
    stabilised: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Queries and values of a GPT-2 adapted apart, with other ranks, stand in one fused layer there."""
    model = load(folders["gpt2"])
    for field, rank in (("*.q_proj", 2), ("*.v_proj", 3)):
        config = LoRAConfig(rank=rank, alpha=5.0, match=(field,), rank_stabilised=stabilised)
        apply_adapter(model.network, config, "tone")
    with torch.no_grad():
        for parameter in adapter_parameters(model.network).values():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.export_adapter(tmp_path / "ours", "tone")
    again = peft.PeftModel.from_pretrained(fresh(folders["gpt2"]), tmp_path / "ours").eval()
    torch.testing.assert_close(reference_logits(again), logits_of(model), rtol=1e-4, atol=1e-4)
    reloaded = load(folders["gpt2"])
    reloaded.load_adapter(tmp_path / "ours")
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=1e-4, atol=1e-4)


def test_several_at_once_under_names(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("lora", "ia3"):
        stirred(peft.get_peft_model(fresh(folders["llama"]), kinds("llama")[kind])).save_pretrained(tmp_path / kind)
    model = load(folders["llama"])
    model.load_adapter(tmp_path / "lora", "one")
    one = logits_of(model)
    model.load_adapter(tmp_path / "ia3", "two")
    both = logits_of(model)
    assert (both - one).abs().max() > 1e-2
    model.use_adapters(["one"])
    assert torch.equal(logits_of(model), one)
    model.use_adapters(["one", "two"])
    model.merge()
    assert not adapter_names(model.network)
    torch.testing.assert_close(logits_of(model), both, rtol=1e-4, atol=1e-4)


def altered(folder: Path, out: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A copy of an adapter with other config keys; tensors of None are left out, others added."""
    out.mkdir()
    data = json.loads((folder / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**data, **(config or {})}))
    held = load_file(folder / "adapter_model.safetensors")
    held = {key: value for key, value in {**held, **tensors}.items() if value is not None}
    save_file(held, out / "adapter_model.safetensors")
    return out


def test_messages(folders: dict[str, Path], tmp_path: Path) -> None:
    peft.get_peft_model(fresh(folders["llama"]), kinds("llama")["lora"]).save_pretrained(tmp_path / "good")
    good, model = tmp_path / "good", load(folders["llama"])
    strange = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16) for i in (7, 8)}
    with pytest.raises(CheckpointError) as error:
        model.load_adapter(altered(good, tmp_path / "strange", **strange))
    assert "2 of 10 tensors match nothing in this model" in str(error.value)
    assert all(name in str(error.value) for name in strange), "all of them are listed"
    assert not adapter_names(model.network), "nothing has been changed"
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(CheckpointError, match=r"q_proj: found no lora_A beside \['lora_b'\], expected both halves"):
        model.load_adapter(altered(good, tmp_path / "half", **{first: None}))
    with pytest.raises(CheckpointError, match=r"lora_a: found shape \(2, 9\), expected \(2, 16\); was the adapter"):
        model.load_adapter(altered(good, tmp_path / "shape", **{first: torch.zeros(2, 9)}))
    with pytest.raises(ConfigError, match="found peft_type 'LOKR', expected one of LORA, IA3"):
        model.load_adapter(altered(good, tmp_path / "kind", {"peft_type": "LOKR"}))
    with pytest.raises(ConfigError, match=r"found modules_to_save: \['classifier'\], which has no native form"):
        model.load_adapter(altered(good, tmp_path / "saved", {"modules_to_save": ["classifier"]}))
    with pytest.raises(ConfigError, match="found bias: 'all', which has no native form"):
        model.load_adapter(altered(good, tmp_path / "bias", {"bias": "all"}))
    with pytest.raises(CheckpointError, match=r"holds no readable adapter_config.json"):
        model.load_adapter(folders["llama"])
    model.load_adapter(good)
    with pytest.raises(ConfigError, match="the model has an adapter 'default' already; choose another name"):
        model.load_adapter(good)
    with pytest.raises(ConfigError, match=r"export: the model has no adapter 'x'; it has: \['default'\]"):
        model.export_adapter(tmp_path / "x", "x")
    with pytest.raises(CheckpointError, match="is not empty; choose a new folder"):
        model.export_adapter(good)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage merges a LoRA, and whose second keeps a bottleneck, a prompt and a prefix."""
    folder = tmp_path_factory.mktemp("run")
    root = small_recipes.write_data(folder / "data", num=12)
    fast = {"use": "adamw", "lr": 0.05}
    lora = {"part": "backbone", "adapter": {"use": "lora", "rank": 2, "match": ["*.q_proj"]}, "name": "tone"}
    kept = [
        {"part": "backbone", "adapter": adapter, "name": adapter["use"]}
        for adapter in (
            {"use": "bottleneck", "width": 4},
            {"use": "prompt", "tokens": 2},
            {"use": "prefix", "tokens": 3},
        )
    ]
    stages = [
        small_recipes.stage("one", train=[lora], steps=2, optimizer=fast),
        small_recipes.stage("two", train=kept, steps=2, optimizer=fast),
    ]
    train(load_recipe(small_recipes.decoder_recipe(root, *stages)), folder / "run", quiet=True)
    return folder / "run"


def test_a_run_exports_what_its_adapters_learned(run: Path, tmp_path: Path) -> None:
    written = export_run_adapters(run, tmp_path / "out")
    names = ["one.tone", "two.bottleneck", "two.prompt", "two.prefix"]
    assert [path.name for path in written] == names
    finished = load(run)
    kept = adapter_parameters(finished.network)
    asked = [Image(PICTURE), "What is it?"]
    expected = finished.logits(asked)
    # A model of the same run without its adapters, which get back what was exported.
    recipe = load_recipe(run / "recipe.yaml")
    tensors = {key: value for key, value in finished.network.state_dict().items() if key not in kept}
    parts = assemble(recipe, run_tokenizer(run))
    parts.network.load_state_dict(tensors)
    model = Model(parts)
    assert np.abs(model.logits(asked) - expected).max() > 1e-3
    for name in names[1:]:
        model.load_adapter(written[names.index(name)], name.partition(".")[2])
    np.testing.assert_allclose(model.logits(asked), expected, atol=1e-6)
    merged = load_file(run / "stages" / "00-one" / "adapters.safetensors")
    out = load_file(tmp_path / "out" / "one.tone" / "adapter_model.safetensors")
    path = "base_model.model.backbone.transformer.blocks.0.attention.q_proj"
    assert sorted(out) == [f"{path}.lora_A.weight", f"{path}.lora_B.weight"]
    assert {t.sum().item() for t in merged.values()} == {t.sum().item() for t in out.values()}


def test_the_command_writes_them_too(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from polymodal.apps.cli import app

    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--format", "adapter", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "two.prompt" / "adapter_config.json").is_file()
    wrong = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "x"), "--format", "onnx"])
    assert wrong.exit_code != 0 and "expected hub or adapter" in " ".join(wrong.output.split())


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_run_loads_in_fewer_bits_with_its_adapters(weights: str, run: Path) -> None:
    if weights != "bf16":
        pytest.importorskip("torchao")
    asked = [Image(PICTURE), "What is it?"]
    exact, small = load(run), load(run, weights=weights)
    assert adapter_names(small.network) == adapter_names(exact.network)
    assert num_bytes(small.network) < num_bytes(exact.network)
    one, other = exact.logits(asked), small.logits(asked)
    assert np.linalg.norm(one - other) / np.linalg.norm(one) < 0.25
    assert small.chat(*asked, max_new_tokens=3).prompt_tokens > 0


def test_a_run_without_adapters_says_so(tmp_path: Path) -> None:
    root = small_recipes.write_data(tmp_path / "data", num=12)
    train(load_recipe(small_recipes.decoder_recipe(root, small_recipes.stage(steps=1))), tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match="no stage of this run trained an adapter"):
        export_run_adapters(tmp_path / "run", tmp_path / "out")
