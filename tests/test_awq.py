"""The paper's method: folding is exact, second moments stand for text, no search loses to plain rounding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from miniawq import awq
from miniawq.awq import PAPER, Fold, Rounding
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.errors import UnsupportedCheckpoint
from miniawq.oracle.target import search_clip, search_scales
from miniawq.packing import dequantize
from miniawq.quantize.grids import GRIDS
from miniawq.quantize.recipes import DEFAULT, Recipe
from miniawq.quantize.recipes import PAPER as PAPER_RECIPE
from tests.helpers import MODELS
from tests.helpers.awq_blocks import Block, channel_spread, layer_and_inputs, statistics_of
from tests.helpers.golden_models import ONE_OF_EACH_FOLD
from tests.helpers.marks import thorough_but
from tests.helpers.tiny_checkpoints import FAMILIES

ROUNDING = Rounding(32)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_no_output(family: str) -> None:
    text = Block(family, torch.float64)
    before = text.run()
    for fold in text.folds:
        channels = len(fold.gather(text.block.get_parameter(f"{fold.balance_layers[0]}.weight")[0]))
        awq.apply_fold(text.block, fold, torch.rand(channels, dtype=torch.float64) * 9 + 0.1, torch.float64)
        torch.testing.assert_close(text.run(), before, rtol=1e-12, atol=1e-12)


def test_folding_is_exact_for_the_norm_that_is_stored() -> None:
    text = Block()
    asked_D = torch.rand(128) * 4 + 0.1
    norm_D = text.block.input_layernorm.weight.data.clone()
    folded_D = awq.apply_fold(text.block, text.folds[0], asked_D, torch.float16)
    stored_D = text.block.input_layernorm.weight
    assert torch.equal(stored_D, stored_D.half().float())
    torch.testing.assert_close(stored_D * folded_D, norm_D, rtol=1e-6, atol=0)
    torch.testing.assert_close(folded_D, asked_D, rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_folds_is_closed(family: str) -> None:
    text = Block(family)
    weights = [parameter.clone() for parameter in text.block.parameters()]
    awq.check_folds(text.block, text.folds, text.run)
    assert all(torch.equal(a, b) for a, b in zip(weights, text.block.parameters(), strict=True))


def test_a_fold_with_an_uncompensated_reader_is_refused() -> None:
    text = Block()
    router = nn.Linear(128, 128, bias=False)
    inner = text.block.mlp.forward
    text.block.mlp.forward = lambda x_BLD: inner(x_BLD) + router(x_BLD) * 1e-2  # type: ignore[method-assign]
    with pytest.raises(UnsupportedCheckpoint, match="post_attention_layernorm"):
        awq.check_folds(text.block, text.folds, text.run)


def test_a_fold_that_misses_a_layer_is_refused() -> None:
    text = Block()
    missing = Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj"), "self_attn")
    with pytest.raises(UnsupportedCheckpoint, match="input_layernorm"):
        awq.check_folds(text.block, [missing], text.run)


@pytest.mark.parametrize("name", ONE_OF_EACH_FOLD)
@pytest.mark.parametrize("recipe", thorough_but([DEFAULT], [PAPER_RECIPE, DEFAULT]), ids=["paper", "default"])
def test_no_family_loses_to_plain_rounding_and_every_fold_of_it_is_exact(name: str, recipe: Recipe) -> None:
    """The blocks that transformers has written: all names and switches of `checkpoint/families.py`."""
    model = load_model(open_checkpoint(MODELS / name), dtype=torch.float32).float()
    text, config = Block.__new__(Block), model.config
    text.config, text.block, text.folds = config, model.model.layers[0], awq.llama_folds(config)
    ropes, masks = model.model.positions(0, 7, 7, None)
    text.rope, text.mask = ropes[config.layer_ropes[0]], masks[config.layer_windows[0]]
    text.hidden_BLD = torch.randn(3, 7, config.hidden_size) * channel_spread(config.hidden_size)
    awq.check_folds(text.block, text.folds, text.run)
    with torch.no_grad():
        searches, layers = text.quantized(replace(recipe, group_size=8))
    assert len(layers) == len([layer for layer in text.block.modules() if isinstance(layer, nn.Linear)])
    assert all(layer.loss <= layer.plain_loss * (1 + 1e-5) for layer in layers.values())
    assert all(search.chosen.loss <= search.trials[0].loss for search in searches if search.fold.smooth_layer)
    assert all(bool((search.factors_P == 1).all()) for search in searches if search.fold.smooth_layer is None)


@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_scaled_is_plain_rounding_between_multiplying_and_dividing(grid: str) -> None:
    weight_OI, rounding = layer_and_inputs(6)[0], Rounding(32, GRIDS[grid])
    factors_I = torch.rand(64) * 4 + 0.1
    assert torch.equal(rounding.scaled(weight_OI, torch.ones(64)), rounding.plain(weight_OI))
    torch.testing.assert_close(
        rounding.scaled(weight_OI, factors_I), rounding.plain(weight_OI * factors_I) / factors_I, rtol=1e-6, atol=0
    )


@given(st.integers(0, 10**6))
def test_second_moments_give_the_loss_on_the_text(seed: int) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    error_OI = ROUNDING.plain(weight_OI) - weight_OI
    on_text = (x_TI @ error_OI.t()).square().mean()
    torch.testing.assert_close(statistics_of(x_TI).losses(error_OI).mean(), on_text, rtol=1e-4, atol=0)


def test_every_stride_th_call_of_a_compared_module_is_kept() -> None:
    text = Block(rows=5)
    with awq.observe(text.block, text.folds, stride=2) as statistics:
        for row_1LD in text.hidden_BLD.split(1):
            text.block(row_1LD, text.rope, text.mask)
    assert [len(seen.calls) for seen in statistics.values()] == [3, 0, 3, 0]
    assert {seen.tokens for seen in statistics.values()} == {5 * 7}


def test_a_block_that_fails_is_observed_no_longer() -> None:
    text = Block(rows=1)
    with pytest.raises(RuntimeError), awq.observe(text.block, text.folds):
        text.block(text.hidden_BLD[:, :, 1:], text.rope, text.mask)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in text.block.modules())


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([16, 32, 64]))
def test_clipping_matches_brute_force(seed: int, group_size: int) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    statistics, rounding = statistics_of(x_TI), Rounding(group_size)
    found_OG2 = awq.search_ranges("mlp.up_proj", weight_OI, statistics, rounding)
    group_OS, moments_SS = weight_OI[:, :group_size], statistics.moments_II[:group_size, :group_size]

    def loss(error_S: Tensor) -> float:
        return float(error_S @ moments_SS @ error_S)

    best = []
    for row_S in group_OS:
        losses = []
        for part in awq.CLIPPED_TO:
            limit = part * row_S.abs().max()
            range_12 = rounding.ranges(row_S.clamp(-limit, limit)[None])[:, 0]
            losses.append(loss(rounding.snap(row_S[None], range_12)[0] - row_S))
        best.append(min(losses))
    error_OS = rounding.snap(group_OS, found_OG2[:, 0]) - group_OS
    found_O = ((error_OS @ moments_SS) * error_OS).sum(1)
    torch.testing.assert_close(found_O, torch.tensor(best), rtol=1e-3, atol=1e-7)


def test_factors_protect_channels_with_large_inputs() -> None:
    weight_OI, x_TI = layer_and_inputs(3, outputs=64, inputs=128, tokens=400)
    factors_I = search_scales(weight_OI, x_TI, 32)
    assert factors_I.shape == (128,)
    assert factors_I.dtype == torch.float32
    assert factors_I[:3].min() > factors_I[3:].mean()
    plain, scaled = ROUNDING.plain(weight_OI), ROUNDING.plain(weight_OI * factors_I) / factors_I
    losses = statistics_of(x_TI).losses
    assert losses(scaled - weight_OI).mean() < 0.5 * losses(plain - weight_OI).mean()


def test_clipped_ranges_are_per_group_and_no_larger_than_the_weights() -> None:
    weight_OI, x_TI = layer_and_inputs(4)
    clip_OG = search_clip(weight_OI, x_TI, 16)
    largest_OG = weight_OI.abs().unflatten(1, (-1, 16)).amax(-1)
    assert clip_OG.shape == (24, 4)
    assert clip_OG.dtype == torch.float32
    assert (clip_OG <= largest_OG).all()
    assert (clip_OG >= largest_OG * min(awq.CLIPPED_TO) * (1 - 1e-6)).all()


def test_ties_go_to_plain_rounding() -> None:
    weight_OI = torch.randint(-7, 8, (8, 32)).float()
    weight_OI[:, 0], weight_OI[:, 1] = 7, -8
    factors_I = search_scales(weight_OI, torch.zeros(4, 32), 32)
    assert torch.equal(factors_I, torch.ones(32)), "no input, no loss: nothing to choose by"
    exact_I = search_scales(weight_OI, torch.randn(40, 32), 32)
    assert torch.equal(exact_I, torch.ones(32)), "codes hold these weights exactly"


def test_factors_are_centred_bounded_and_one_where_nothing_lives() -> None:
    activation_P = torch.tensor([1e-30, 0.0, 1.0, 4.0, 1e30])
    factors_P = awq.normalised(activation_P.log(), activation_P > 0)
    torch.testing.assert_close(factors_P, torch.tensor([1e-4, 1.0, 1.0, 4.0, 1e4]))
    assert torch.equal(awq.normalised(torch.zeros(3).log(), torch.zeros(3) > 0), torch.ones(3))


def test_q_and_k_stay_unclipped_by_exact_name() -> None:
    text = Block()
    _, layers = awq.quantize_block(text.block, text.observed(), ROUNDING, PAPER, torch.float16)
    assert layers["self_attn.q_proj"].loss == layers["self_attn.q_proj"].plain_loss
    assert layers["self_attn.k_proj"].loss == layers["self_attn.k_proj"].plain_loss
    assert layers["self_attn.v_proj"].loss != layers["self_attn.v_proj"].plain_loss


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_no_row_loses_by_the_codes_that_are_stored(seed: int) -> None:
    """Searches round by float32 reciprocals, and may find what only they lose less by; stored codes decide."""
    weight_OI, x_TI = layer_and_inputs(seed)
    statistics, worse = statistics_of(x_TI), torch.zeros(24, 4, 2)

    def searched(name: str, weight_OI: Tensor, *_: object) -> Tensor:
        """Ranges of random width: some rows gain by them, others lose."""
        ranges_OG2 = Rounding(16).ranges(weight_OI)
        return ranges_OG2 * (0.6 + 0.6 * torch.rand(worse.shape, generator=torch.Generator().manual_seed(seed)))

    plain, found = Rounding(16).ranges(weight_OI), searched("", weight_OI)
    layer = awq.quantize_layer("mlp.up_proj", weight_OI, statistics, Rounding(16), PAPER._replace(ranges=searched))
    plain_O, found_O, stored_O = (
        statistics.losses(dequantize(codes, torch.float32) - weight_OI)
        for codes in (Rounding(16).codes(weight_OI, plain), Rounding(16).codes(weight_OI, found), layer.quantized)
    )
    assert (found_O > plain_O).any(), "there is something to prevent"
    assert torch.equal(stored_O, torch.minimum(found_O, plain_O))
