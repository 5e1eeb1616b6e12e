"""The transformer stack: parity with published architectures, packing, padding, cache."""

import pytest
import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.layers import (
    KVCache,
    Layout,
    LearnedPositions,
    Memory,
    Transformer,
    TransformerConfig,
    grid_codes,
    sincos_2d,
    sinusoidal,
)
from polymodal.models.layers.mlp import MLP
from polymodal.models.layers.positions import rope_tables, rotate

LLAMA = TransformerConfig(
    width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, norm="rms", activation="silu", gated=True, bias=False,
    rope_theta=10_000.0, norm_eps=1e-6,
)  # fmt: skip
VARIANTS = {
    "gpt2": TransformerConfig(width=32, depth=2, activation="gelu_tanh"),
    "llama": LLAMA,
    "qwen3": LLAMA.model_copy(update={"qk_norm": True, "head_dim": 16}),
    "qwen2": LLAMA.model_copy(update={"qkv_bias": True}),
    "branch": TransformerConfig(width=32, depth=2, branch_norm=True),
    "bert": TransformerConfig(width=32, depth=2, pre_norm=False, final_norm=False),
    "scaled": TransformerConfig(width=32, depth=2, layer_scale=0.1, activation="quick_gelu"),
    "relu": TransformerConfig(width=32, depth=2, activation="relu", qk_norm=True),
}


def make(config: TransformerConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for parameter in model.parameters():  # large random weights: an error cannot hide behind small branches
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def copy_linear(target: torch.nn.Module, source: torch.nn.Module) -> None:
    target.weight.data.copy_(source.weight)
    if source.bias is not None:
        target.bias.data.copy_(source.bias)


def copy_norm(target: torch.nn.Module, source: torch.nn.Module) -> None:
    target.weight.data.copy_(source.weight)
    if getattr(source, "bias", None) is not None:
        target.bias.data.copy_(source.bias)


def shake(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)


def test_equals_transformers_llama_and_qwen3() -> None:
    from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

    shared = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    cases = [
        (LlamaModel(LlamaConfig(**shared)), LLAMA),
        (Qwen3Model(Qwen3Config(**shared, head_dim=16)), VARIANTS["qwen3"]),
    ]
    for reference, config in cases:
        shake(reference.eval())
        ours = Transformer(config).eval()
        for block, layer in zip(ours.blocks, reference.layers, strict=True):
            for name, theirs in (("q_proj",) * 2, ("k_proj",) * 2, ("v_proj",) * 2, ("out_proj", "o_proj")):
                copy_linear(getattr(block.attention, name), getattr(layer.self_attn, theirs))
            if config.qk_norm:
                copy_norm(block.attention.q_norm, layer.self_attn.q_norm)
                copy_norm(block.attention.k_norm, layer.self_attn.k_norm)
            for name in ("gate_proj", "up_proj", "down_proj"):
                copy_linear(getattr(block.mlp, name), getattr(layer.mlp, name))
            copy_norm(block.attention_norm, layer.input_layernorm)
            copy_norm(block.mlp_norm, layer.post_attention_layernorm)
        copy_norm(ours.final_norm, reference.norm)
        ids = torch.randint(50, (2, 9))
        x_BTD = reference.embed_tokens(ids)
        expected = reference(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(ours(x_BTD, Layout(causal=True)), expected, atol=1e-5, rtol=1e-5)


def test_equals_transformers_gpt2() -> None:
    from transformers import GPT2Config, GPT2Model

    reference = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)).eval()
    shake(reference)
    ours = Transformer(VARIANTS["gpt2"]).eval()
    for block, layer in zip(ours.blocks, reference.h, strict=True):
        weights = layer.attn.c_attn.weight.T.chunk(3)
        biases = layer.attn.c_attn.bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            getattr(block.attention, name).weight.data.copy_(weight)
            getattr(block.attention, name).bias.data.copy_(bias)
        pairs = [(block.attention.out_proj, layer.attn.c_proj), (block.mlp.up_proj, layer.mlp.c_fc)]
        for target, source in [*pairs, (block.mlp.down_proj, layer.mlp.c_proj)]:
            target.weight.data.copy_(source.weight.T)
            target.bias.data.copy_(source.bias)
        copy_norm(block.attention_norm, layer.ln_1)
        copy_norm(block.mlp_norm, layer.ln_2)
    copy_norm(ours.final_norm, reference.ln_f)
    positions = LearnedPositions(16, 32)
    positions.weight.data.copy_(reference.wpe.weight)
    ids = torch.randint(50, (2, 9))
    x_BTD = reference.wte(ids) + positions(torch.arange(9)[None])
    torch.testing.assert_close(positions.first(9), reference.wpe.weight[:9])
    expected = reference(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours(x_BTD, Layout(causal=True)), expected, atol=1e-5, rtol=1e-5)


def test_equals_transformers_bert_with_padding() -> None:
    from transformers import BertConfig, BertModel

    settings = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    reference = BertModel(settings).eval()
    shake(reference)
    ours = Transformer(VARIANTS["bert"]).eval()
    for block, layer in zip(ours.blocks, reference.encoder.layer, strict=True):
        for name, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            copy_linear(getattr(block.attention, name), getattr(layer.attention.self, theirs))
        copy_linear(block.attention.out_proj, layer.attention.output.dense)
        copy_norm(block.attention_norm, layer.attention.output.LayerNorm)
        copy_linear(block.mlp.up_proj, layer.intermediate.dense)
        copy_linear(block.mlp.down_proj, layer.output.dense)
        copy_norm(block.mlp_norm, layer.output.LayerNorm)
    ids = torch.randint(50, (2, 9))
    is_valid = torch.arange(9) < torch.tensor([[9], [5]])
    expected = reference(ids, attention_mask=is_valid.long()).last_hidden_state
    ours_BTD = ours(reference.embeddings(ids), Layout.padded(is_valid, causal=False))
    torch.testing.assert_close(ours_BTD[is_valid], expected[is_valid], atol=1e-5, rtol=1e-5)


def test_equals_transformers_vit() -> None:
    from transformers import ViTConfig, ViTModel

    settings = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16, patch_size=4,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    reference = ViTModel(settings, add_pooling_layer=False).eval()
    shake(reference)
    ours = Transformer(TransformerConfig(width=32, depth=2)).eval()
    theirs = dict(reference.named_parameters())
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    for index, block in enumerate(ours.blocks):
        prefix = next(name.split(f"layers.{index}.")[0] for name in theirs if f"layers.{index}." in name)
        layer = reference.get_submodule(f"{prefix}layers.{index}")
        for name, other in names.items():
            copy_linear(getattr(block.attention, name), getattr(layer.attention, other))
        copy_linear(block.mlp.up_proj, layer.mlp.fc1)
        copy_linear(block.mlp.down_proj, layer.mlp.fc2)
        copy_norm(block.attention_norm, layer.layernorm_before)
        copy_norm(block.mlp_norm, layer.layernorm_after)
    copy_norm(ours.final_norm, reference.layernorm)
    images = torch.randn(2, 3, 16, 16)
    expected = reference(images).last_hidden_state
    ours_BTD = ours(reference.embeddings(images), Layout(causal=False))
    torch.testing.assert_close(ours_BTD, expected, atol=1e-5, rtol=1e-5)


def run_with_gradients(model: Transformer, pieces: list[Tensor], how: str, causal: bool) -> tuple[list, list]:
    """Outputs of each piece and the gradients of the sum of their squares, run alone, padded or packed."""
    model.zero_grad()
    lengths = [len(piece) for piece in pieces]
    if how == "alone":
        outs = [model(piece[None], Layout(causal))[0] for piece in pieces]
    elif how == "packed":
        outs = list(model(torch.cat(pieces)[None], Layout.packed(lengths, causal))[0].split(lengths))
    else:
        side = -1 if how == "right" else 0
        longest = max(lengths)
        place = [slice(0, n) if side else slice(longest - n, longest) for n in lengths]
        x_BTD = torch.full((len(pieces), longest, pieces[0].shape[1]), 3.0)
        is_valid = torch.zeros(len(pieces), longest, dtype=torch.bool)
        positions = torch.zeros(len(pieces), longest, dtype=torch.int64)
        for row, (piece, where) in enumerate(zip(pieces, place, strict=True)):
            x_BTD[row, where], is_valid[row, where] = piece, True
            positions[row, where] = torch.arange(len(piece))
        out = model(x_BTD, Layout.padded(is_valid, causal, positions))
        assert out.isfinite().all()
        outs = [out[row, where] for row, where in enumerate(place)]
    sum(out.square().sum() for out in outs).backward()
    return outs, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_padded_equals_alone(name: str, causal: bool) -> None:
    model = make(VARIANTS[name]).double()  # double: what differs is the rule, not the order of sums
    pieces = [torch.randn(n, 32, dtype=torch.float64) for n in (5, 3, 3, 7, 1)]
    torch.set_default_dtype(torch.float64)
    try:
        expected, expected_grads = run_with_gradients(model, pieces, "alone", causal)
        for how in ("packed", "right", "left"):
            outs, grads = run_with_gradients(model, pieces, how, causal)
            for out, wanted in zip(outs, expected, strict=True):
                torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)
            for grad, wanted in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_segments_never_see_each_other(causal: bool) -> None:
    model = make(LLAMA)
    lengths = (4, 4, 2, 6)
    x_BTD = torch.randn(1, 16, 32)
    changed = x_BTD.clone()
    changed[:, 4:8] += 1.0
    before = model(x_BTD, Layout.packed(lengths, causal))
    after = model(changed, Layout.packed(lengths, causal))
    same = torch.ones(16, dtype=torch.bool)
    same[4:8] = False
    assert torch.equal(before[0, same], after[0, same])
    assert not torch.allclose(before[0, ~same], after[0, ~same])


def test_equal_lengths_share_one_attention_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "polymodal.models.layers.attention.F.scaled_dot_product_attention",
        lambda q, *rest, **named: calls.append(tuple(q.shape)) or real(q, *rest, **named),
    )
    model = make(TransformerConfig(width=32, depth=1))
    model(torch.randn(1, 10, 32), Layout.packed((3, 3, 3, 1), causal=True))
    assert calls == [(3, 4, 3, 8), (1, 4, 1, 8)]


def test_masks_appear_only_where_they_are_needed() -> None:
    assert Layout.padded(torch.ones(2, 4, dtype=torch.bool), causal=False).is_valid_BT is None
    right = torch.tensor([[True, True, False], [True, True, True]])
    assert Layout.padded(right, causal=True).mask is None
    torch.testing.assert_close(Layout.padded(right, causal=False).mask[:, 0, 0], right)
    left = Layout.padded(right.flip(1), causal=True).mask
    assert left[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_without_padding_gives_the_worked_example() -> None:
    is_valid = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    layout, index_N = Layout.padded(is_valid, causal=True).without_padding()
    assert (layout.segment_lengths, index_N.tolist()) == ((1, 2), [4, 0, 1])
    assert layout.positions_BT.tolist() == [[0, 0, 1]]
    assert Layout.padded(is_valid, causal=False).without_padding() is None
    assert Layout(causal=True).without_padding() is None
    little = torch.arange(20) < torch.tensor([[20], [19]])
    assert Layout.padded(little, causal=True).without_padding() is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_padding_is_not_computed_and_changes_nothing(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x_BTD = make(VARIANTS[name]), torch.randn(4, 12, 32)
    is_valid = torch.arange(12) < torch.tensor([[12], [3], [1], [7]])
    is_valid = {"right": is_valid, "left": is_valid.flip(1), "holes": torch.rand(4, 12) < 0.5}[padding]
    is_valid[0] = True
    layout = Layout.padded(is_valid, causal=True)
    seen: list[int] = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:2].numel()))
    fast = model(x_BTD, layout)
    monkeypatch.setattr("polymodal.models.layers.layout._MIN_PADDING", 1.0)
    slow = model(x_BTD, layout)
    assert seen == [int(is_valid.sum()), 48]
    torch.testing.assert_close(fast[is_valid], slow[is_valid], atol=1e-5, rtol=1e-5)
    assert not fast[~is_valid].any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "scaled"])
def test_cached_equals_uncached_token_by_token(name: str) -> None:
    model = make(VARIANTS[name])
    x_BTD = torch.randn(3, 9, 32)
    with torch.no_grad():
        expected = model(x_BTD, Layout(causal=True))
        cache = model.new_cache(3, 9)
        steps = [model(x_BTD[:, t : t + 1], Layout(causal=True), cache) for t in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-5, rtol=1e-5)
        chunks = model.new_cache(3, 12)
        parts = [model(piece, Layout(causal=True), chunks) for piece in x_BTD.split([4, 3, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-5, rtol=1e-5)
    assert (cache.length, chunks.length) == (9, 9)


def test_rows_of_different_lengths_decode_as_if_alone() -> None:
    model = make(LLAMA)
    lengths, new = (5, 2, 4), 3
    rows = [torch.randn(n + new, 32) for n in lengths]
    is_valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    prompt = torch.randn(3, 5, 32)
    for row, (x_TD, n) in enumerate(zip(rows, lengths, strict=True)):
        prompt[row, :n] = x_TD[:n]
    cache = model.new_cache(3, 8)
    with torch.no_grad():
        model(prompt, Layout.padded(is_valid, causal=True), cache)
        assert cache.lengths_B.tolist() == list(lengths)
        outs = []
        for step in range(new):
            token = torch.stack([x_TD[n + step] for x_TD, n in zip(rows, lengths, strict=True)])[:, None]
            outs.append(model(token, Layout(causal=True), cache))
        out = torch.cat(outs, 1)
        for row, (x_TD, n) in enumerate(zip(rows, lengths, strict=True)):
            alone = model(x_TD[None], Layout(causal=True))[0, n:]
            torch.testing.assert_close(out[row], alone, atol=2e-5, rtol=1e-5)
        # A finished row leaves; a chunk with padding of its own is read by rows of different lengths.
        cache.select(torch.tensor([2, 0]))
        chunk = torch.randn(2, 2, 32)
        chunk_valid = torch.tensor([[True, False], [True, True]])
        cache.crop(7)
        with pytest.raises(ConfigError, match=r"found 7 \+ 2 tokens, expected at most 8"):
            model(chunk, Layout.padded(chunk_valid, causal=True), cache)
        longer = KVCache(2, 2, 2, 10, 8)
        longer.keys[:, :, :, :8], longer.values[:, :, :, :8] = cache.keys, cache.values
        longer._lengths = list(cache._lengths)
        out = model(chunk, Layout.padded(chunk_valid, causal=True), longer)
        for row, old in enumerate((2, 0)):
            before = rows[old][:7]
            alone = model(torch.cat((before, chunk[row]))[None], Layout(causal=True))[0, 7:]
            count = int(chunk_valid[row].sum())
            torch.testing.assert_close(out[row, :count], alone[:count], atol=2e-5, rtol=1e-5)
        assert longer.lengths_B.tolist() == [8, 9]


def test_a_prefix_is_reused() -> None:
    model = make(LLAMA)
    prefix, tails = torch.randn(1, 4, 32), torch.randn(3, 2, 32)
    with torch.no_grad():
        cache = model.new_cache(1, 4)
        model(prefix, Layout(causal=True), cache)
        fork = cache.clone(rows=3, max_tokens=6)
        out = model(tails, Layout(causal=True), fork)
        expected = model(torch.cat((prefix.expand(3, -1, -1), tails), 1), Layout(causal=True))[:, 4:]
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
        assert (cache.length, fork.length) == (4, 6)
        fork.crop(4)
        torch.testing.assert_close(model(tails, Layout(causal=True), fork), out)
    with pytest.raises(ConfigError, match="found 3 rows, expected 1 row to repeat 2 times"):
        fork.clone(rows=2)
    with pytest.raises(ConfigError, match="found 6 tokens, expected at most the copy's 5"):
        fork.clone(max_tokens=5)


@pytest.mark.parametrize("every", [1, 2])
def test_cross_attention_packed_equals_alone_and_an_empty_memory_gives_zero(every: int) -> None:
    model = make(TransformerConfig(width=32, depth=3, cross_width=12, cross_every=every)).double()
    assert [block.cross_attention is not None for block in model.blocks] == [i % every == 0 for i in range(3)]
    pieces = [torch.randn(n, 32, dtype=torch.float64) for n in (3, 3, 2)]
    memory_BMC = torch.randn(3, 5, 12, dtype=torch.float64)
    memory_lengths = (5, 2, 0)
    is_valid = torch.arange(5) < torch.tensor(memory_lengths)[:, None]
    packed = model(torch.cat(pieces)[None], Layout.packed((3, 3, 2), True), memory=Memory(memory_BMC, is_valid))
    for out, piece, row, n in zip(packed[0].split([3, 3, 2]), pieces, range(3), memory_lengths, strict=True):
        memory = Memory(memory_BMC[row : row + 1, :n]) if n else None
        alone = model(piece[None], Layout(causal=True), memory=memory)[0]
        torch.testing.assert_close(out, alone, atol=1e-9, rtol=1e-9)
    padded = torch.stack(pieces[:2])
    out = model(padded, Layout(causal=True), memory=Memory(memory_BMC[:2], is_valid[:2]))
    alone = model(padded[1:], Layout(causal=True), memory=Memory(memory_BMC[1:2, :2]))
    torch.testing.assert_close(out[1:], alone)
    with pytest.raises(ConfigError, match="found a memory of 3 rows, expected 2"):
        model(padded, Layout(causal=True), memory=Memory(memory_BMC))


def test_checkpointing_changes_no_gradient() -> None:
    model = make(LLAMA).train()
    x_BTD = torch.randn(2, 6, 32)
    grads = []
    for on in (False, True):
        model.checkpointing = on
        model.zero_grad()
        model(x_BTD, Layout(causal=True)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


BATCH_NORM = TransformerConfig(width=32, depth=2, norm="batch")
CROSSING = TransformerConfig(width=32, depth=2, cross_width=12)
GATED_CROSSING = CROSSING.model_copy(update={"cross_gate": "tanh", "cross_every": 2})


@pytest.mark.parametrize(
    "config", [*VARIANTS.values(), BATCH_NORM, CROSSING, GATED_CROSSING], ids=[*VARIANTS, "batch", "cross", "gated"]
)
@pytest.mark.parametrize("how", ["packed", "padded", "little padding"])
def test_reading_some_tokens_gives_their_states_and_gradients(config: TransformerConfig, how: str) -> None:
    model = make(config).double().train()
    lengths = (6, 6, 5) if how == "little padding" else (2, 6, 3)
    if how == "packed":
        x_BTD, layout = torch.randn(1, sum(lengths), 32, dtype=torch.float64), Layout.packed(lengths, causal=True)
        read_K = torch.tensor([0, 3, 4, 10])
    else:
        x_BTD = torch.randn(3, 6, 32, dtype=torch.float64)
        layout = Layout.padded(torch.arange(6) < torch.tensor(lengths)[:, None], causal=True)
        read_K = torch.tensor([1, 7, 10, 14])
    memory = None if config.cross_width is None else Memory(torch.randn(3, 5, 12, dtype=torch.float64))
    found = []
    for early in (True, False):
        model.zero_grad()
        x = x_BTD.clone().requires_grad_()
        if early:
            states_KD = model(x, layout, memory=memory, read_K=read_K)
        else:
            states_KD = model(x, layout, memory=memory).flatten(0, 1)[read_K]
        states_KD.square().sum().backward()
        found.append([states_KD, x.grad, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_last_block_computes_no_more_than_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make(LLAMA), []
    original = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: tokens.append(x.shape[1]) or original(self, x))
    model(torch.randn(1, 9, 32), Layout.packed((4, 5), causal=True), read_K=torch.tensor([2, 8]))
    assert tokens == [9, 2]


def test_dropout_acts_only_while_training() -> None:
    model = make(TransformerConfig(width=32, depth=2, dropout=0.5))
    x_BTD = torch.randn(1, 4, 32)
    layout = Layout(causal=False)
    assert torch.equal(model(x_BTD, layout), model(x_BTD, layout))
    model.train()
    assert not torch.equal(model(x_BTD, layout), model(x_BTD, layout))


def test_initial_weights_have_the_stated_size() -> None:
    torch.manual_seed(0)
    block = Transformer(TransformerConfig(width=128, depth=8)).blocks[0]
    cut = 0.88  # what cutting at two deviations leaves of the deviation
    assert block.attention.q_proj.weight.std().item() == pytest.approx(cut * 128**-0.5, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(cut * 512**-0.5 / 4, rel=0.05)
    assert block.mlp.up_proj.weight.abs().max().item() <= 2 * 128**-0.5
    assert block.mlp.up_proj.bias.abs().max().item() == 0.0


def test_autocast_keeps_one_dtype_in_attention() -> None:
    model = make(VARIANTS["qwen3"])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(1, 5, 32), Layout(causal=True))
    assert out.isfinite().all()


def test_positions() -> None:
    codes = sinusoidal(5, 8)
    assert codes.shape == (5, 8)
    torch.testing.assert_close(codes[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    grid = sincos_2d(2, 3, 8)
    assert grid.shape == (6, 8)
    torch.testing.assert_close(grid[0, :4], grid[2, :4])  # same row
    torch.testing.assert_close(grid[0, 4:], grid[3, 4:])  # same column
    with pytest.raises(ConfigError, match="found width 7, expected an even number"):
        sinusoidal(3, 7)
    with pytest.raises(ConfigError, match="found width 10, expected a multiple of 4"):
        sincos_2d(2, 2, 10)
    with pytest.raises(ConfigError, match="found 4 positions, expected at most 3"):
        LearnedPositions(3, 8).first(4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_and_its_gradient_are_those_of_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tables = rope_tables(torch.arange(7)[None], 8, 100.0, torch.float64 if dtype == torch.float64 else torch.float32)
    x_BTHK = torch.randn(2, 7, 3, 8, dtype=dtype, requires_grad=True)
    turned = rotate(x_BTHK, tables)
    assert turned.dtype == dtype
    exact = x_BTHK.detach().double().requires_grad_()
    first, second = exact.chunk(2, dim=-1)
    expected = exact * tables[0].double() + torch.cat((-second, first), dim=-1) * tables[1].double()
    if dtype == torch.float32:
        first, second = x_BTHK.detach().chunk(2, dim=-1)
        assert torch.equal(turned, x_BTHK * tables[0] + torch.cat((-second, first), dim=-1) * tables[1])
    weight = torch.randn(expected.shape, dtype=dtype)
    turned.backward(weight)
    expected.backward(weight.double())
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(turned.double(), expected, rtol=rtol, atol=4 * rtol)
    torch.testing.assert_close(x_BTHK.grad.double(), exact.grad, rtol=rtol, atol=4 * rtol)


def test_grid_codes_are_centred_half_as_large_as_features_and_tell_places_apart():
    codes_ND = grid_codes(8, 96)
    assert codes_ND.shape == (64, 96)
    torch.testing.assert_close(codes_ND.mean(dim=0), torch.zeros(96), atol=1e-6, rtol=0)
    torch.testing.assert_close(codes_ND.square().mean().sqrt(), torch.tensor(0.5))
    # Rows and columns can be read off linearly, which the first steps of a decoder need.
    for target_N in (torch.arange(64.0) // 8, torch.arange(64.0) % 8):
        design = torch.cat((codes_ND, torch.ones(64, 1)), dim=1)
        fitted_N = design @ torch.linalg.lstsq(design, target_N, driver="gelsd").solution
        assert (fitted_N - target_N).abs().max() < 0.05
    assert torch.cdist(codes_ND, codes_ND).add(torch.eye(64) * 1e3).min() > 1.0
    assert grid_codes(1, 8).tolist() == [[0.0] * 8]


def test_gated_mlp() -> None:
    mlp = MLP(4, 6, "silu", gated=True, bias=False)
    x = torch.randn(2, 4)
    expected = (torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ (
        mlp.down_proj.weight.T
    )
    torch.testing.assert_close(mlp(x), expected)


def test_messages_say_what_was_found() -> None:
    model = make(LLAMA)
    x_BTD = torch.randn(2, 4, 32)
    with pytest.raises(ConfigError, match="packed layout of 5 tokens: found an input of 2 rows and 4 tokens"):
        model(x_BTD, Layout.packed((3, 2), causal=True))
    with pytest.raises(ConfigError, match=r"found is_valid of shape \(2, 3\), expected \(2, 4\)"):
        model(x_BTD, Layout.padded(torch.tensor([[True, False, False]] * 2), causal=True))
    with pytest.raises(ConfigError, match="each above 0"):
        Layout.packed((3, 0), causal=True)
    with pytest.raises(ConfigError, match="expected causal padded rows"):
        model(x_BTD, Layout(causal=False), model.new_cache(2, 8))
    with pytest.raises(ConfigError, match="read_K: found a cache or dropping"):
        model(x_BTD, Layout(causal=True), model.new_cache(2, 8), read_K=torch.tensor([1]))
    with pytest.raises(ConfigError, match="set cross_width"):
        model(x_BTD, Layout(causal=False), memory=Memory(torch.randn(2, 3, 32)))
    with pytest.raises(ConfigError, match="width 30 is not a multiple of heads 4"):
        TransformerConfig.parse({"width": 30, "heads": 4})
    with pytest.raises(ConfigError, match="heads 4 is not a multiple of kv_heads 3"):
        TransformerConfig.parse({"kv_heads": 3})
    with pytest.raises(ConfigError, match="rotary codes need an even head width, found 3"):
        TransformerConfig.parse({"width": 12, "heads": 4, "rope_theta": 10000.0})
