"""What masked modelling hides: shares, kinds, blocks, and that the generator's state decides."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.models.compose.masking import TokenChoice, mask_blocks, mask_tokens, normalised_patches
from polymodal.models.compose.negatives import draw_similar

CHOICE = TokenChoice(mask_id=1, control_ids=(0, 1, 2), size=1000)


def test_fifteen_in_a_hundred_are_hidden_as_bert_hides_them() -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (200, 100))
    hidden, is_masked = mask_tokens(ids, torch.ones_like(ids, dtype=torch.bool), 0.15, CHOICE)
    assert is_masked.sum(1).tolist() == [15] * 200
    assert torch.equal(hidden[~is_masked], ids[~is_masked])
    became_mask = (hidden == 1)[is_masked].float().mean()
    stayed = (hidden == ids)[is_masked].float().mean()
    assert became_mask == pytest.approx(0.8, abs=0.02) and stayed == pytest.approx(0.1, abs=0.02)
    changed = hidden[is_masked & (hidden != ids) & (hidden != 1)]
    assert len(changed) > 200 and int(changed.min()) >= 3, "no control token stands for a word"


def test_padding_and_control_tokens_are_never_hidden_and_one_word_always_is() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[2, 5, 2, 0, 0], [2, 7, 8, 9, 2], [2, 2, 0, 0, 0]])
    is_valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    for _ in range(20):
        _, is_masked = mask_tokens(ids, is_valid, 0.15, CHOICE)
        assert is_masked.sum(1).tolist() == [1, 1, 0]
        assert not is_masked[ids <= 2].any()


def test_the_same_state_of_the_generator_hides_the_same() -> None:
    ids = torch.randint(3, 1000, (4, 30))
    valid = torch.ones_like(ids, dtype=torch.bool)
    state = torch.get_rng_state()
    first = mask_tokens(ids, valid, 0.3, CHOICE), mask_blocks([(6, 6)], 0.4, 36, ids.device)
    torch.set_rng_state(state)
    again = mask_tokens(ids, valid, 0.3, CHOICE), mask_blocks([(6, 6)], 0.4, 36, ids.device)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True)) and torch.equal(first[1], again[1])


def test_a_tokenizer_without_a_token_for_it_is_refused() -> None:
    assert TokenChoice.of({"[MASK]": 7, "[CLS]": 3}, 10) == TokenChoice(7, (3, 7), 10)
    with pytest.raises(
        ConfigError, match=r"no token for hidden ones; expected one of .* among its control tokens \['x'\]"
    ):
        TokenChoice.of({"x": 1}, 10)


def test_blocks_hide_their_share_of_each_picture() -> None:
    torch.manual_seed(0)
    grids = [(14, 14), (3, 7), (1, 1), (1, 9)] * 10
    is_masked = mask_blocks(grids, 0.4, 200, torch.device("cpu"))
    assert is_masked.shape == (40, 200)
    expected = [78, 8, 1, 4] * 10
    assert is_masked.sum(1).tolist() == expected
    assert not is_masked[1::4, 21:].any()


def test_blocks_are_rectangles_not_single_patches() -> None:
    """Of a random choice of 40%, four in ten of a patch's neighbours are hidden; of blocks, far more."""
    torch.manual_seed(0)
    square = mask_blocks([(14, 14)] * 20, 0.4, 196, torch.device("cpu")).view(20, 14, 14)
    both = (square[:, :, 1:] & square[:, :, :-1]).sum() / square[:, :, :-1].sum()
    assert both > 0.7


def test_normalised_patches_have_mean_zero_and_deviation_one() -> None:
    patches = normalised_patches(torch.randn(2, 3, 48) * 5 + 2)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 3), atol=1e-4, rtol=0)


def test_negatives_are_drawn_by_likeness_among_those_allowed() -> None:
    torch.manual_seed(0)
    similarity = torch.tensor([[1.0, 0.9, 0.2, 0.9]]).expand(2000, 4)
    may = torch.tensor([[False, True, True, False]]).expand(2000, 4)
    drawn = draw_similar(similarity, may)
    chance = torch.softmax(torch.tensor([0.9, 0.2]) / 0.07, 0)[0]
    assert set(drawn.tolist()) <= {1, 2}
    assert (drawn == 1).float().mean() == pytest.approx(float(chance), abs=0.01)
