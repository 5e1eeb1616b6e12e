"""ALBEF against the paper's equations: the reference library's parts, put together as section 3.1 says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.compose.joint import JointRun
from polymodal.models.presets import find_size
from polymodal.models.presets.albef import ALBEF
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .bert_tokenizer import bert_tokenizer
from .reference import assert_close, randomise

transformers = pytest.importorskip("transformers")

TEXTS = ["a red dog", "what is it on the grass?", "cats"]
PICTURES = [
    PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)) for i in range(3)
]
SAMPLES = [
    pm.Sample(str(i), views={"text": pm.Text(text), "image": pm.Image(picture)})
    for i, (text, picture) in enumerate(zip(TEXTS, PICTURES, strict=True))
]
WIDTH, VISION = 32, 24


class Published(nn.Module):
    """The parts of ALBEF under the published code's names; layers 2 and 3 look at the picture, 0 and 1 do not."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.vision = transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=VISION, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * VISION,
                image_size=24, patch_size=8, layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
        config = transformers.BlipTextConfig(
            **sizes, vocab_size=rows, encoder_hidden_size=VISION, max_position_embeddings=16
        )
        self.text = transformers.BlipTextModel(config, add_pooling_layer=False)
        self.segments = nn.Embedding(2, WIDTH)
        self.vision_proj, self.text_proj = nn.Linear(VISION, 20), nn.Linear(WIDTH, 20)
        self.itm_head, self.temp = nn.Linear(WIDTH, 2), nn.Parameter(torch.tensor(0.07))
        self.transform, self.norm, self.bias = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Parameter(torch.zeros(rows)),
        )

    def forward(self, pixels: Tensor, ids: Tensor, attends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Picture states, states of the lower and of the upper layers."""
        image = self.vision(pixels).last_hidden_state
        embeddings = self.text.embeddings
        x = (
            embeddings.word_embeddings(ids)
            + self.segments.weight[0]
            + embeddings.position_embeddings.weight[: ids.shape[1]]
        )
        x = embeddings.LayerNorm(x)
        mask = (1.0 - attends[:, None, None].float()) * -1e9
        for layer in self.text.encoder.layer[:2]:
            x = layer(x, attention_mask=mask)
        lower = x
        for layer in self.text.encoder.layer[2:]:
            x = layer(x, image, attention_mask=mask)
        return image, lower, x

    def stored(self) -> dict[str, Tensor]:
        """The tensors as the published code names them."""
        kept = ("vision_proj", "text_proj", "itm_head", "temp")
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name.split(".")[0] in kept}
        bert, heads = "text_encoder.bert.", "text_encoder.cls.predictions."
        for name, tensor in self.text.state_dict().items():
            is_lower_cross = name.startswith(("encoder.layer.0.cross", "encoder.layer.1.cross"))
            if not is_lower_cross:
                tensors[bert + name] = tensor
        tensors[bert + "embeddings.token_type_embeddings.weight"] = self.segments.weight
        for kind in ("weight", "bias"):
            tensors[f"{heads}transform.dense.{kind}"] = getattr(self.transform, kind)
            tensors[f"{heads}transform.LayerNorm.{kind}"] = getattr(self.norm, kind)
        tensors[heads + "decoder.weight"] = self.text.embeddings.word_embeddings.weight.clone()
        tensors[heads + "decoder.bias"] = self.bias
        return tensors | _vision(self.vision)


def _vision(vision: Any) -> dict[str, Tensor]:
    state = vision.state_dict()
    hub = {
        "layernorm_before": "norm1", "attention.o_proj": "attn.proj", "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    tensors = {
        "visual_encoder.cls_token": state["embeddings.cls_token"],
        "visual_encoder.pos_embed": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        tensors[f"visual_encoder.patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        tensors[f"visual_encoder.norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(2):
            own = f"layers.{i}."
            fused = [state[f"{own}attention.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"visual_encoder.blocks.{i}.attn.qkv.{kind}"] = torch.cat(fused)
            for theirs, ours in hub.items():
                tensors[f"visual_encoder.blocks.{i}.{ours}.{kind}"] = state[f"{own}{theirs}.{kind}"]
    return tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    """A folder in the published layout, and what it holds."""
    import json

    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("albef")
    tokenizer = bert_tokenizer(16)
    torch.manual_seed(0)
    reference = randomise(Published(len(tokenizer)))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in reference.stored().items()}
    save_file(tensors, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "albef", "image_size": 24, "patch_size": 8, "vision_width": VISION, "vision_layers": 2,
        "vision_heads": 4, "text_width": WIDTH, "text_layers": 2, "joint_layers": 2, "text_heads": 4,
        "vocab_size": len(tokenizer), "max_position_embeddings": 16, "max_tokens": 12, "embed_dim": 20,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, reference


def test_states_follow_the_equations(made: tuple[Path, Published]) -> None:
    folder, reference = made
    model = pm.load(folder)
    batch = to_device(model.engine.processor.batch(SAMPLES), "cpu")
    ids = batch.streams["text"].values
    attends = torch.arange(ids.shape[1]) < batch.streams["text"].lengths[:, None]
    with torch.no_grad():
        image, lower, upper = reference(batch.streams["image"].values, ids, attends)
        run = JointRun(model.network, batch, {n: model.network.encode(n, s) for n, s in batch.streams.items()})
        states = run.states(*run.lay_out(run.features))
        words = model.network.heads["words"](states.x["text"])[attends]
        hidden = reference.norm(nn.functional.gelu(reference.transform(upper)))
        expected = hidden @ reference.text.embeddings.word_embeddings.weight.T + reference.bias
    assert_close(run.features["image"].x_UND, image)
    assert_close(run.features["text"].x_UND[attends], lower[attends])
    assert_close(states.x["text"][attends], upper[attends])
    assert_close(words, expected[attends], rel=2e-4)  # two layers of norms amplify the last places
    with torch.no_grad():
        scores = reference.itm_head(upper[:, 0])
        similarity = (
            nn.functional.normalize(reference.vision_proj(image[:, 0]))
            @ nn.functional.normalize(reference.text_proj(lower[:, 0])).T
        )
    assert_close(model.engine.match_logits(SAMPLES), scores[:, 1] - scores[:, 0])
    ours = model.embed([pm.Image(picture) for picture in PICTURES]) @ model.embed(TEXTS).T
    assert_close(ours, similarity)
    assert_close(model.network.heads["space"].scale.detach(), (1.0 / reference.temp).detach())


def test_the_export_holds_the_same_tensors(made: tuple[Path, Published], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, _ = made
    assert pm.load(folder).export(tmp_path / "ours") == "albef"
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    tied = "text_encoder.cls.predictions.decoder.weight"
    assert set(before) - {tied} == set(after) - {tied}
    for name in after:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=0)


def test_another_model_is_not_exported_as_one(made: tuple[Path, Published]) -> None:
    model = pm.load(made[0]).recipe.model
    with pytest.raises(ConfigError, match="albef: found a model of other parts"):
        ALBEF.names(model.model_copy(update={"heads": {}}), ())


def test_the_published_size_has_its_number_of_parameters() -> None:
    architecture, size = find_size("albef-base")
    with no_weights():
        network = MultimodalModel(architecture.model(HubConfigs(size.config)), 30522)
    assert num_parameters(network) == size.parameters
    assert round(num_parameters(network.streams["image"]) / 1e6, 1) == 85.8
    lower_and_joint = num_parameters(network.streams["text"]) + num_parameters(network.backbone)
    # The paper's 123.7M hold the transform and bias of the masked head as well.
    assert round((lower_and_joint + 768 * 768 + 3 * 768 + 30522) / 1e6, 1) == 123.7
