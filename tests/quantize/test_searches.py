"""Our searches: never worse than plain rounding, each step gains, and nothing in the text can break them."""

import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from miniawq import awq
from miniawq.awq import Rounding, Statistics
from miniawq.packing import Quantized, dequantize
from miniawq.quantize import moments
from miniawq.quantize.factors import coarse_to_fine, factors_by, relative_weight
from miniawq.quantize.job import note_on
from miniawq.quantize.moments import SymmetricStatistics
from miniawq.quantize.ranges import COARSE, independent_sides, shrunk
from miniawq.quantize.recipes import DEFAULT, NEIGHBOURS, PAPER, RECIPES, Recipe
from tests.helpers.awq_blocks import Block, layer_and_inputs, statistics_of
from tests.helpers.marks import each_once

SMALL = replace(DEFAULT, group_size=32)
ROUNDING = Rounding(32)


@pytest.mark.parametrize("recipe", [DEFAULT, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_no_search_loses_to_plain_rounding(recipe: Recipe, grid: str) -> None:
    searches, layers = Block("qwen3").quantized(replace(recipe, group_size=32, grid=grid))
    gains = [search.chosen.loss / search.trials[0].loss for search in searches]
    assert max(gains) <= 1
    assert min(gains) < 0.95, "with outliers in the inputs, scaling gains something"
    assert all(search.trials[0][:2] == ("activations", 0) for search in searches)
    assert all(layer.loss <= layer.plain_loss * (1 + 1e-5) for layer in layers.values())


@pytest.mark.parametrize("recipe", ["default", "neighbours", "paper"])
def test_no_row_loses_more_by_its_stored_codes_than_plain_rounding_of_the_same_weight(recipe: str) -> None:
    text = Block(rows=1)
    text.hidden_BLD = text.hidden_BLD[:, :3]  # little text: what C shrunk says and what C says differ much
    text.rope = tuple(table_LE[:3] for table_LE in text.rope)
    text.mask = None if text.mask is None else text.mask[..., :3, :3]
    weights = []

    def codes(weight_OI: Tensor, nearest: Quantized, statistics: Statistics) -> Quantized:
        weights.append((weight_OI, statistics))
        return method.codes(weight_OI, nearest, statistics)

    chosen = replace(RECIPES[recipe], group_size=32)
    rounding, method = chosen.rounding, chosen.method
    _, layers = awq.quantize_block(text.block, text.observed(), rounding, method._replace(codes=codes), torch.float16)
    for (weight_OI, statistics), layer in zip(weights, layers.values(), strict=True):
        plain = rounding.codes(weight_OI, rounding.ranges(weight_OI))
        found_O, plain_O = (
            statistics.losses(dequantize(some, torch.float32) - weight_OI) for some in (layer.quantized, plain)
        )
        assert (found_O <= plain_O).all()


def test_the_block_holds_what_the_codes_stand_for() -> None:
    text = Block()
    _, layers = text.quantized(SMALL)
    for name, layer in layers.items():
        assert torch.equal(text.block.get_parameter(f"{name}.weight"), dequantize(layer.quantized, torch.float32))


def test_symmetry_halves_products_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "BLOCK_ROWS", 24)
    weight_OI, x_TI = layer_and_inputs(2)
    plain, symmetric = statistics_of(x_TI), statistics_of(x_TI, SymmetricStatistics)
    torch.testing.assert_close(symmetric.moments_II, plain.moments_II)
    torch.testing.assert_close(symmetric.magnitude_I, plain.magnitude_I)
    torch.testing.assert_close(plain.moments_II, x_TI.t() @ x_TI / len(x_TI))
    error_OI = ROUNDING.plain(weight_OI) - weight_OI
    torch.testing.assert_close(symmetric.losses(error_OI), (error_OI @ plain.moments_II @ error_OI.t()).diagonal())


def test_second_moments_and_the_text_choose_the_same_factors() -> None:
    text = Block()
    statistics = text.observed()
    for fold in text.folds:
        if not fold.compares_one_layer:
            continue
        module = text.block.get_submodule(fold.compared)
        inputs: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, arguments, inputs=inputs: inputs.append(arguments[0]))
        text.run()
        handle.remove()
        search = replace(SMALL, stride=1).method.factors(text.block, fold, statistics[fold], ROUNDING)
        weight_OI, losses = module.weight, {}
        weights = [text.block.get_parameter(f"{name}.weight") for name in fold.balance_layers]
        activation_P = fold.gather(statistics[fold].magnitude_I)
        weight_P = fold.gather(relative_weight(weights, 32))
        for formula, ratio, _ in search.trials:
            factors_I = fold.spread(factors_by(formula, ratio, activation_P, weight_P))
            error_OI = ROUNDING.plain(weight_OI * factors_I) / factors_I - weight_OI
            losses[formula, ratio] = float((inputs[0] @ error_OI.t()).square().mean())
        assert min(losses, key=losses.__getitem__) == search.chosen[:2]


def test_one_formula_searched_finely_is_the_papers_search() -> None:
    text = Block()
    for fold, seen in text.observed().items():
        ours = coarse_to_fine(("activations",), 20, 1)(text.block, fold, seen, ROUNDING)
        papers = awq.search_factors(text.block, fold, seen, ROUNDING)
        assert ours.trials == papers.trials
        assert torch.equal(ours.factors_P, papers.factors_P)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([16, 32, 64]))
def test_range_search_never_raises_the_shrunk_loss(seed: int, group_size: int) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    statistics, rounding = statistics_of(x_TI), Rounding(group_size)
    moments_II = shrunk(statistics.moments_II)

    def loss(ranges_OG2: Tensor) -> float:
        error_OI = rounding.snap(weight_OI.unflatten(1, (-1, group_size)), ranges_OG2).flatten(1) - weight_OI
        return float(((error_OI @ moments_II) * error_OI).sum())

    found_OG2 = independent_sides("", weight_OI, statistics, rounding)
    assert loss(found_OG2) <= loss(rounding.ranges(weight_OI)) * (1 + 1e-5)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_last_range_is_the_best_for_the_whole_layer(seed: int) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    statistics, rounding = statistics_of(x_TI), Rounding(16)
    moments_II = shrunk(statistics.moments_II)
    plain_OG2 = rounding.ranges(weight_OI)
    found_OG2 = independent_sides("", weight_OI, statistics, rounding)

    def losses(range_O2: Tensor) -> Tensor:
        ranges_OG2 = torch.cat((found_OG2[:, :-1], range_O2[:, None]), dim=1)
        error_OI = rounding.snap(weight_OI.unflatten(1, (-1, 16)), ranges_OG2).flatten(1) - weight_OI
        return ((error_OI @ moments_II) * error_OI).sum(1)

    tried_KO = torch.stack(
        [losses(plain_OG2[:, -1] * (1 + torch.tensor(moves))) for moves in itertools.product(COARSE, repeat=2)]
    )
    assert (losses(found_OG2[:, -1]) <= tried_KO.amin(0) * (1 + 1e-4) + 1e-6).all()


def test_each_step_of_the_method_gains_where_a_few_inputs_are_large() -> None:
    weight_OI, x_TI = layer_and_inputs(5, outputs=64, inputs=128, tokens=400)
    steps = [
        replace(SMALL, formulas=(), clip="none"),
        replace(SMALL, formulas=(), clip="limits"),
        replace(SMALL, formulas=(), clip="ranges"),
        replace(SMALL, formulas=(), codes="neighbours"),
    ]
    losses = [
        awq.quantize_layer("mlp.up_proj", weight_OI, statistics_of(x_TI), step.rounding, step.method).loss
        for step in steps
    ]
    assert all(after < before for before, after in pairwise(losses)), losses


def test_heads_that_share_a_value_channel_share_its_factor() -> None:
    text = Block()
    fold = text.folds[1]
    search = SMALL.method.factors(text.block, fold, text.observed()[fold], ROUNDING)
    heads, shared, size = text.config.num_attention_heads, 2, text.config.head_dim
    assert search.factors_P.shape == (heads // shared * size,)
    factors_HE = fold.spread(search.factors_P).view(heads, size)
    assert torch.equal(factors_HE[0], factors_HE[1])
    assert not torch.equal(factors_HE[1], factors_HE[2])
    assert search.chosen.loss < search.trials[0].loss


@pytest.mark.parametrize("recipe", [SMALL, replace(PAPER, group_size=32)], ids=["default", "paper"])
def test_order_of_samples_changes_nothing(recipe: Recipe) -> None:
    text, shuffled = Block(), Block()
    shuffled.hidden_BLD = text.hidden_BLD[[2, 0, 1]]
    first, first_layers = text.quantized(recipe)
    second, second_layers = shuffled.quantized(recipe)
    for one, other in zip(first, second, strict=True):
        assert one.chosen[:2] == other.chosen[:2]
        torch.testing.assert_close(one.factors_P, other.factors_P, rtol=1e-3, atol=0)
    for name, layer in first_layers.items():
        other_OI = second_layers[name].quantized.codes_OI
        assert (layer.quantized.codes_OI != other_OI).float().mean() < 1e-2


@pytest.mark.parametrize(("value", "recipe"), each_once((math.nan, math.inf, 1e30), (DEFAULT, PAPER, NEIGHBOURS)))
def test_broken_activations_mean_plain_rounding_and_a_note(value: float, recipe: Recipe) -> None:
    text = Block()
    text.block.mlp.up_proj.bias = nn.Parameter(torch.zeros(256), requires_grad=False)
    text.block.mlp.up_proj.bias[0] = value
    plain_OI = ROUNDING.plain(text.block.mlp.down_proj.weight)
    notes = [note_on(fold, seen) for fold, seen in text.observed().items()]
    searches, layers = text.quantized(replace(recipe, group_size=32))
    assert notes[:2] == ["", ""]
    assert "NaN" in notes[3]
    assert torch.equal(searches[3].factors_P, torch.ones(256))
    assert math.isnan(searches[3].chosen.loss)
    assert torch.equal(dequantize(layers["mlp.down_proj"].quantized, torch.float32), plain_OI)


@pytest.mark.parametrize("recipe", [SMALL, replace(PAPER, group_size=32)], ids=["default", "paper"])
def test_dead_channels_keep_their_factor_and_are_told(recipe: Recipe) -> None:
    text = Block()
    text.block.input_layernorm.weight.data[5:9] = 0
    fold = text.folds[0]
    statistics = text.observed()[fold]
    search = recipe.method.factors(text.block, fold, statistics, ROUNDING)
    assert torch.equal(search.factors_P[5:9], torch.ones(4))
    assert note_on(fold, statistics) == "4 channels are never active"
    assert search.factors_P.isfinite().all()


@pytest.mark.parametrize("recipe", [DEFAULT, PAPER, NEIGHBOURS])
def test_groups_of_zeros_and_one_token_are_handled(recipe: Recipe) -> None:
    text = Block(rows=1)
    text.hidden_BLD = text.hidden_BLD[:, :1]
    text.rope = tuple(table_LE[:1] for table_LE in text.rope)
    for parameter in text.block.parameters():
        if parameter.ndim == 2:
            parameter.data[:, :32] = 0
    _, layers = text.quantized(replace(recipe, group_size=32))
    assert text.run().isfinite().all()
    assert all(layer.quantized.scales_OG.isfinite().all() for layer in layers.values())


def test_whole_rows_can_be_one_group() -> None:
    _, layers = Block().quantized(replace(DEFAULT, group_size=-1))
    assert layers["mlp.down_proj"].quantized.scales_OG.shape == (128, 1)
