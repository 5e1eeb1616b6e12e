"""The composed model: packing leaks nothing, absent modalities change nothing, counts are proved, heads agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from toys import Toy, asked, build, decoder_data, medium, merge_data, mixed, stream

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.models.compose import ModelConfig
from polymodal.models.compose.readouts import supports


@pytest.fixture(scope="module")
def toy() -> Toy:
    return build(decoder_data())


def sample_losses(toy: Toy, batch: Batch) -> torch.Tensor:
    """The summed next-token loss of each sample."""
    outputs = toy.network(batch)
    losses = F.cross_entropy(outputs.token_logits, outputs.token_targets, reduction="none")
    return losses.new_zeros(batch.num_samples).index_add(0, outputs.token_samples, losses)


def gradients(toy: Toy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    toy.network.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in toy.network.named_parameters() if p.grad is not None}
    toy.network.zero_grad(set_to_none=True)
    return found


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> bool:
    """Whether two tensors agree relative to the size of the expected one."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm()) <= relative * float(expected.norm()) + 1e-9


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_every_parameter_alone_and_packed_agree(positions: str, tied: bool) -> None:
    toy = build(decoder_data(tied=tied, positions=positions))
    samples = mixed()
    packed = sample_losses(toy, toy.batch(samples, packed=True))
    for index, sample in enumerate(samples):
        alone = sample_losses(toy, toy.batch([sample]))[0]
        assert close(packed[index], alone)
        expected = gradients(toy, alone)
        found = gradients(toy, sample_losses(toy, toy.batch(samples, packed=True))[index])
        total = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            if name.endswith("k_proj.bias") and gradient.norm() <= 1e-6 * total:
                # Without rotary codes one vector added to every key changes no softmax: the exact gradient is zero.
                assert found[name].norm() <= 1e-6 * total, name
            else:
                assert close(found[name], gradient), name
        assert all(not found[name].any() for name in found.keys() - expected.keys())


def test_changing_one_sample_of_a_pack_changes_no_bit_of_the_others(toy: Toy) -> None:
    samples = mixed()
    with torch.no_grad():
        before = sample_losses(toy, toy.batch(samples, packed=True))
        batch = toy.batch(samples, packed=True)
        first = batch.segment_lengths[0]
        batch.ids[0, 1 : first - 1] = toy.tokenizer.control("<|user|>")
        for name in batch.streams:
            own = torch.repeat_interleave(
                batch.streams[name].sample_of_item == 0, torch.tensor(batch.streams[name].unit_counts)
            )
            batch.streams[name].values[own] += 1.0
        after = sample_losses(toy, batch)
    assert after[0] != before[0]
    assert torch.equal(after[1:], before[1:])


def test_order_and_padding_do_not_matter(toy: Toy) -> None:
    samples = mixed()
    with torch.no_grad():
        forward = sample_losses(toy, toy.batch(samples))
        backward = sample_losses(toy, toy.batch(samples[::-1])).flip(0)
        alone = torch.cat([sample_losses(toy, toy.batch([sample])) for sample in samples])
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(forward, alone, rtol=1e-5, atol=1e-6)


def test_an_absent_modality_changes_nothing_in_the_others_and_gets_no_gradient(toy: Toy) -> None:
    texts_and_images = [asked(3, "image"), asked(2)]
    found = gradients(toy, sample_losses(toy, toy.batch(texts_and_images)).sum())
    used = {name.split(".")[1] for name in found if name.startswith("streams.")}
    assert used == {"image"}
    data = decoder_data()
    data["streams"] = {"image": data["streams"]["image"]}
    smaller = build(data)
    smaller.network.load_state_dict(
        {k: v for k, v in toy.network.state_dict().items() if k in smaller.network.state_dict()}
    )
    batch = toy.batch(texts_and_images)
    assert torch.equal(sample_losses(smaller, smaller.batch(texts_and_images)), sample_losses(toy, batch))


def test_a_wrong_number_of_features_is_an_error_with_both_numbers(toy: Toy) -> None:
    batch = toy.batch([asked(0, "image"), asked(1, "image")])
    batch.streams["image"].token_index = batch.streams["image"].token_index[:-1]
    with pytest.raises(ConfigError, match=r"stream 'image': 8 media tokens for 7 placeholders \(2 items\)"):
        toy.network(batch)


def test_media_tokens_stand_at_their_placeholders_in_order(toy: Toy) -> None:
    batch = toy.batch([asked(3, "image", "sensor", "image"), asked(1, "image")], packed=True)
    x_TD = toy.network.embed_sequence(batch)[0]
    is_media = batch.ids[0] == toy.tokenizer.media_id
    assert int(is_media.sum()) == sum(len(s.token_index) for s in batch.streams.values())
    text = toy.network.decoder.embed(batch.ids)[0]
    assert torch.equal(x_TD[~is_media], text[~is_media])
    for name, entry in batch.streams.items():
        expected = toy.network.connect(name, toy.network.encode(name, entry), entry)
        assert torch.equal(x_TD[entry.token_index], expected)
    assert batch.streams["image"].token_index[:4].tolist() == list(range(1, 5))


def test_a_tiled_image_is_several_units_of_one_item() -> None:
    data = decoder_data()
    reader = {"use": "image", "size_px": 16, "resolution": "anyres", "grids": [[1, 2]], "thumbnail": True}
    data["streams"] = {"image": stream("image", reader=reader), "detail": stream("image")}
    toy = build(data)
    samples = [asked(0, "image", "image"), asked(1), asked(2, "image")]
    batch = toy.batch(samples)
    assert batch.streams["image"].unit_counts == [3, 3, 3]
    assert batch.streams["image"].token_counts == [12, 12, 12]
    assert batch.streams["detail"].token_counts == [4, 4, 4]
    assert batch.streams["image"].grids == [(1, 2)] * 3
    assert batch.streams["image"].sample_of_item.tolist() == [0, 0, 2]
    packed = sample_losses(toy, toy.batch(samples, packed=True))
    for index, sample in enumerate(samples):
        assert close(packed[index], sample_losses(toy, toy.batch([sample]))[0])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_share_the_embedding_and_untied_ones_do_not(tied: bool) -> None:
    toy = build(decoder_data(tied=tied))
    head = toy.network.head("next_token")
    assert (head.proj.weight is toy.network.decoder.embed_tokens.weight) == tied
    names = dict(toy.network.named_parameters())
    assert ("heads.answer.proj.weight" in names) != tied


def test_every_encoder_runs_once_for_several_passes() -> None:
    data = decoder_data()
    data["heads"]["space"] = {"use": "projection", "dim": 8, "streams": ["image", "audio"]}
    toy = build(data)
    calls: list[int] = []
    toy.network.streams["image"].encoder.register_forward_hook(lambda *_: calls.append(1))
    outputs = toy.network(toy.batch([asked(0, "image", "audio"), asked(1, "image")]), ("sequence", "embed"))
    assert len(calls) == 1
    assert outputs.token_logits is not None and set(outputs.embeddings) == {"image", "audio"}


def test_projections_have_unit_length_and_the_temperature_stands_apart() -> None:
    data = {
        "streams": {name: stream(name, enters="none") for name in ("text", "image", "audio")},
        "backbone": "none",
        "heads": {"space": {"use": "projection", "dim": 8, "temperature": 0.05, "max_scale": 30.0, "bias": -3.0}},
    }
    toy = build(data)
    views = [
        Sample("a", views={"image": medium("image"), "text": Text("a red cube")}),
        Sample("b", views={"audio": medium("audio"), "text": Text("a beep")}),
    ]
    outputs = toy.network(toy.batch(views), ("embed",))
    assert outputs.embeddings["text"][1].tolist() == [0, 1]
    assert outputs.embeddings["audio"][1].tolist() == [1]
    for vectors, _ in outputs.embeddings.values():
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    assert float(outputs.scale.detach()) == pytest.approx(20.0)
    assert float(outputs.bias.detach()) == -3.0
    toy.network.head("projection").log_scale.data.fill_(10.0)
    assert float(toy.network.head("projection").scale.detach()) == 30.0


def test_units_of_one_item_are_averaged_for_the_shared_space() -> None:
    reader = {"use": "image", "size_px": 16, "resolution": "anyres", "grids": [[1, 2]], "thumbnail": True}
    data = {
        "streams": {"image": stream("image", enters="none", reader=reader)},
        "backbone": "none",
        "heads": {"space": {"use": "projection", "dim": 8}},
    }
    toy = build(data)
    batch = toy.batch([Sample("a", views={"image": medium("image")}), Sample("b", views={"image": medium("image", 1)})])
    vectors, samples = toy.network(batch, ("embed",)).embeddings["image"]
    pooled = toy.network.encode("image", batch.streams["image"]).pooled_UD.view(2, 3, -1).mean(1)
    torch.testing.assert_close(vectors, toy.network.head("projection")(pooled, "image"))
    assert samples.tolist() == [0, 1]


def test_cached_features_stand_in_for_the_encoder(toy: Toy) -> None:
    samples = [asked(0, "image"), asked(1, "image")]
    batch = toy.batch(samples)
    expected = toy.network(batch).token_logits
    features = toy.network.encode("image", batch.streams["image"])
    batch.streams["image"].features = (features.x_UND, features.is_valid_UN, features.pooled_UD)
    batch.streams["image"].values = None
    assert torch.equal(toy.network(batch).token_logits, expected)


def test_parameter_names_are_stable(toy: Toy) -> None:
    tops = {".".join(name.split(".")[:3]) for name, _ in toy.network.named_parameters() if name.startswith("streams")}
    assert tops == {f"streams.{name}.{part}" for name in toys.MEDIA for part in ("encoder", "connector")}
    rest = {name.split(".")[0] for name, _ in toy.network.named_parameters()}
    assert rest == {"streams", "backbone"}


def test_the_same_seed_gives_the_same_weights() -> None:
    one, other = build(decoder_data(), seed=3), build(decoder_data(), seed=3)
    for (name, a), b in zip(one.network.state_dict().items(), other.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_unknown_pass_or_a_missing_head_says_what_there_is(toy: Toy) -> None:
    batch = toy.batch([asked(0)])
    with pytest.raises(ConfigError, match="unknown pass 'merged'; did you mean 'merge'"):
        toy.network(batch, ("merged",))
    with pytest.raises(ConfigError, match=r"no head of the kind 'projection'; its heads: \['answer'\]"):
        toy.network(batch, ("embed",))
    with pytest.raises(ConfigError, match="needs a merge backbone; the model's backbone is 'decoder'"):
        toy.network(batch, ("merge",))
    merged = build(merge_data())
    with pytest.raises(ConfigError, match="needs a decoder backbone; the model's backbone is 'merge'"):
        _ = merged.network.decoder


WRONG: list[tuple[Any, str]] = [
    (lambda d: d.update(heads={}), "heads: expected at least one"),
    (lambda d: d["streams"]["image"].update(modality="imge"), "unknown modality 'imge'; did you mean 'image'"),
    (lambda d: d["streams"]["image"].update(modality="audio"), "encoder 'vit' is for image, the stream is audio"),
    (lambda d: d["streams"]["image"].update(reader="audio"), "reader 'audio' is for audio, the stream is image"),
    (lambda d: d["streams"]["image"].update(enters="none", connector="linear"), "its connector would never run"),
    (lambda d: d["streams"]["image"].update(enters="merge"), "enters by 'merge', which needs the backbone 'merge'"),
    (lambda d: d["streams"]["image"]["encoder"].update(use="vitt"), "unknown encoder 'vitt'; did you mean 'vit'"),
    (lambda d: d["heads"].update(kind={"use": "matching"}), "a 'matching' head, needs the backbone 'merge'"),
    (lambda d: d["heads"].update(second={"use": "next_token"}), "expected each kind but masked_token and pooler once"),
    (lambda d: d.update(backbone="none"), "needs the backbone 'decoder'; found 'none'"),
    (lambda d: d["backbone"].update(chat="turnz"), "unknown chat format 'turnz'; did you mean 'turns'"),
    (lambda d: d.update(tokenizer={"use": "file"}), "'path' belongs to use: file"),
    (lambda d: d["streams"]["image"]["encoder"].update(depth=0), "depth"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_config_that_does_not_fit_together_is_refused_by_name(spoil: Any, message: str) -> None:
    data = decoder_data()
    data["streams"]["image"] = {**data["streams"]["image"], "encoder": dict(data["streams"]["image"]["encoder"])}
    spoil(data)
    with pytest.raises(ConfigError) as error:
        ModelConfig.parse(data, "model")
    assert message in str(error.value)


def test_a_projection_over_a_stream_that_is_not_there_is_refused() -> None:
    data = decoder_data()
    data["heads"]["space"] = {"use": "projection", "streams": ["smell"]}
    with pytest.raises(ConfigError, match=r"streams \['smell'\] are not in the model"):
        build(data)


def test_the_resolved_config_reads_back_equal() -> None:
    for data in (decoder_data(), merge_data(), merge_data({"use": "concat", "axis": "sequence"}, missing="learned")):
        config = ModelConfig.parse(data)
        again = ModelConfig.parse(config.to_data())
        assert again == config
        assert again.to_data() == config.to_data()


def test_supports_names_the_passes_that_a_model_can_run() -> None:
    assert supports(ModelConfig.parse(decoder_data())) == {"sequence"}
    assert supports(ModelConfig.parse(merge_data())) == {"merge"}
    matching = merge_data(heads={"m": {"use": "matching"}})
    assert supports(ModelConfig.parse(matching)) == {"merge", "match", "match_any"}
