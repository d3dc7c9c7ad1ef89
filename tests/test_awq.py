"""The method: folding is exact, no search loses to plain rounding, and nothing in the text can break it."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import FAMILIES, config_of, dense_model
from torch import Tensor, nn

from miniawq import awq, rounding
from miniawq.awq import DEFAULT, PAPER, Fold, Recipe, Statistics
from miniawq.errors import UnsupportedCheckpoint
from miniawq.model import DecoderBlock, LlamaConfig
from miniawq.packing import dequantize
from miniawq.quantize import fold_table
from miniawq.rounding import (
    CLIP_LIMITS,
    COARSE,
    Rounding,
    layer_loss,
    limit_search,
    moves,
    range_search,
    row_losses,
    shrunk,
)

SMALL = replace(DEFAULT, group_size=32)


class Block:
    """A decoder block with some text in front of it."""

    def __init__(self, family: str = "llama", dtype: torch.dtype = torch.float32, rows: int = 3) -> None:
        model = dense_model(config_of(family)).to(dtype)
        self.config: LlamaConfig = model.config
        self.block: DecoderBlock = model.model.layers[0]
        self.folds = fold_table(model.config)
        self.hidden_BLD = torch.randn(rows, 7, model.config.hidden_size, dtype=dtype) * channel_spread(128).to(dtype)
        self.rope, masks = model.model.positions(0, 7, None, self.hidden_BLD)
        self.mask = masks[model.config.layer_windows[0]]

    def run(self) -> Tensor:
        return self.block(self.hidden_BLD, self.rope, self.mask)

    def observed(self) -> dict[Fold, Statistics]:
        with awq.observe(self.block, self.folds, range(9)) as statistics:
            for row_1LD in self.hidden_BLD.split(1):
                self.block(row_1LD, self.rope, self.mask)
        return statistics


def channel_spread(channels: int) -> Tensor:
    """Magnitudes with a few large ones, as in trained models."""
    spread = torch.rand(channels, generator=torch.Generator().manual_seed(1)) + 0.1
    spread[:3] *= 20
    return spread


def layer_and_inputs(seed: int, outputs: int = 24, inputs: int = 64, tokens: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * 0.3 + torch.eye(inputs)
    x_TI = torch.randn(tokens, inputs, generator=generator) @ mix * channel_spread(inputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator) ** 3 / 10
    return weight_OI, x_TI, x_TI.t() @ x_TI / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_no_output(family: str) -> None:
    text = Block(family, torch.float64)
    before = text.run()
    for fold in text.folds:
        channels = len(text.block.get_parameter(f"{fold.previous}.weight"))
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


@pytest.mark.parametrize("recipe", [DEFAULT, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_no_search_loses_to_plain_rounding(recipe: Recipe, grid: str) -> None:
    text = Block("qwen3")
    result = awq.quantize_block(text.block, text.observed(), replace(recipe, group_size=32, grid=grid))
    gains = [search.chosen.loss / search.trials[0].loss for search in result.searches]
    assert max(gains) <= 1
    assert min(gains) < 0.95, "with outliers in the inputs, scaling gains something"
    assert all(search.trials[0][:2] == awq.PLAIN for search in result.searches)
    assert all(layer.loss <= layer.plain_loss * (1 + 1e-5) for layer in result.layers.values())


def test_the_block_holds_what_the_codes_stand_for() -> None:
    text = Block()
    result = awq.quantize_block(text.block, text.observed(), SMALL)
    for name, layer in result.layers.items():
        assert torch.equal(text.block.get_parameter(f"{name}.weight"), dequantize(layer.quantized, torch.float32))


def test_symmetry_halves_products_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "BLOCK", 24)
    weight_OI, x_TI, moments_II = layer_and_inputs(2)
    error_OI = Rounding(32).plain(weight_OI) - weight_OI
    torch.testing.assert_close(row_losses(error_OI, moments_II), (error_OI @ moments_II @ error_OI.t()).diagonal())
    _, _, statistics = awq._one_layer(weight_OI, x_TI)
    torch.testing.assert_close(statistics.moments_II, moments_II)


@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_scaled_is_plain_rounding_between_multiplying_and_dividing(grid: str) -> None:
    weight_OI, recipe = layer_and_inputs(6)[0], Rounding(32, grid)
    scales_I = torch.rand(64) * 4 + 0.1
    assert torch.equal(recipe.scaled(weight_OI, torch.ones(64)), recipe.plain(weight_OI))
    torch.testing.assert_close(
        recipe.scaled(weight_OI, scales_I), recipe.plain(weight_OI * scales_I) / scales_I, rtol=1e-6, atol=0
    )


@given(st.integers(0, 10**6))
def test_second_moments_give_the_loss_on_the_text(seed: int) -> None:
    weight_OI, x_TI, moments_II = layer_and_inputs(seed)
    error_OI = Rounding(32).plain(weight_OI) - weight_OI
    on_text = (x_TI @ error_OI.t()).square().mean()
    torch.testing.assert_close(layer_loss(error_OI, moments_II), on_text, rtol=1e-4, atol=0)


def test_second_moments_and_the_text_choose_the_same_scales() -> None:
    text = Block()
    statistics = text.observed()
    for fold in text.folds:
        if fold.linears != (fold.compared,):
            continue
        module = text.block.get_submodule(fold.compared)
        inputs: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, arguments, inputs=inputs: inputs.append(arguments[0]))
        text.run()
        handle.remove()
        search = awq.search_fold(text.block, fold, statistics[fold], replace(SMALL, stride=1))
        weight_OI, losses = module.weight, {}
        for formula, ratio, _ in search.trials:
            channels = len(text.block.get_parameter(f"{fold.previous}.weight"))
            weights = [text.block.get_parameter(f"{name}.weight") for name in fold.linears]
            scales_I = fold.spread(
                awq.candidate_scales(
                    fold.gather(statistics[fold].magnitude_I, channels),
                    fold.gather(awq.relative_weight(weights, SMALL), channels),
                    formula,
                    ratio,
                )
            )
            error_OI = SMALL.plain(weight_OI * scales_I) / scales_I - weight_OI
            losses[formula, ratio] = float((inputs[0] @ error_OI.t()).square().mean())
        assert min(losses, key=losses.__getitem__) == search.chosen[:2]


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([16, 32, 64]))
def test_range_search_never_loses_and_limits_match_brute_force(seed: int, group_size: int) -> None:
    weight_OI, _, moments_II = layer_and_inputs(seed)
    rounding = Rounding(group_size)

    def loss(ends_OG2: Tensor) -> float:
        rounded_OI = rounding.snap(rounding.grouped(weight_OI), ends_OG2).flatten(1)
        return float(layer_loss(rounded_OI - weight_OI, shrunk(moments_II)))

    assert loss(range_search(weight_OI, moments_II, rounding)) <= loss(rounding.ends(weight_OI)) * (1 + 1e-5)
    found_OG2 = limit_search(weight_OI, moments_II, rounding)
    group_OS, moments_SS = weight_OI[:, :group_size], moments_II[:group_size, :group_size]
    limits_OG2 = []
    for row_S in group_OS:
        errors = []
        for part in CLIP_LIMITS:
            limit = part * row_S.abs().max()
            error_1S = rounding.snap(row_S[None], rounding.ends(row_S.clamp(-limit, limit)[None])[:, 0]) - row_S
            errors.append(float(layer_loss(error_1S, moments_SS)))
        limits_OG2.append(min(errors))
    error_OS = rounding.snap(group_OS, found_OG2[:, 0]) - group_OS
    found_O = ((error_OS @ moments_SS) * error_OS).sum(1)
    torch.testing.assert_close(found_O, torch.tensor(limits_OG2), rtol=1e-3, atol=1e-7)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_last_range_is_the_best_for_the_whole_layer(seed: int) -> None:
    weight_OI, _, moments_II = layer_and_inputs(seed)
    rounding = Rounding(16)
    plain_OG2, found_OG2 = rounding.ends(weight_OI), range_search(weight_OI, moments_II, rounding)

    def losses(ends_O2: Tensor) -> Tensor:
        ends_OG2 = torch.cat((found_OG2[:, :-1], ends_O2[:, None]), dim=1)
        error_OI = rounding.snap(rounding.grouped(weight_OI), ends_OG2).flatten(1) - weight_OI
        return row_losses(error_OI, shrunk(moments_II))

    tried_KO = torch.stack(
        [losses(ends_O2) for ends_O2 in moves(COARSE, torch.device("cpu"))(plain_OG2[:, -1], plain_OG2[:, -1])]
    )
    assert (losses(found_OG2[:, -1]) <= tried_KO.amin(0) * (1 + 1e-4) + 1e-6).all()


def test_each_step_of_the_method_gains_where_a_few_inputs_are_large() -> None:
    weight_OI, _, moments_II = layer_and_inputs(5, outputs=64, inputs=128, tokens=400)
    steps = [
        replace(SMALL, formulas=(), clip="none"),
        replace(SMALL, formulas=(), clip="limits"),
        replace(SMALL, formulas=(), clip="ranges"),
        replace(SMALL, formulas=(), compensate=True),
    ]
    seen = Statistics(moments_II.diagonal().sqrt(), moments_II, tokens=400)
    losses = [awq.quantize_layer(weight_OI, seen, recipe).loss for recipe in steps]
    assert all(after < before for before, after in pairwise(losses)), losses


def test_scales_protect_channels_with_large_inputs() -> None:
    weight_OI, x_TI, moments_II = layer_and_inputs(3, outputs=64, inputs=128, tokens=400)
    scales_I = awq.search_scales(weight_OI, x_TI, 32)
    assert scales_I.shape == (128,)
    assert scales_I.dtype == torch.float32
    assert scales_I[:3].min() > scales_I[3:].mean()
    plain, scaled = Rounding(32).plain(weight_OI), Rounding(32).plain(weight_OI * scales_I) / scales_I
    assert layer_loss(scaled - weight_OI, moments_II) < 0.5 * layer_loss(plain - weight_OI, moments_II)


def test_clip_limits_are_per_group_and_no_larger_than_the_weights() -> None:
    weight_OI, x_TI, _ = layer_and_inputs(4)
    clip_OG = awq.search_clip(weight_OI, x_TI, 16)
    largest_OG = weight_OI.abs().unflatten(1, (-1, 16)).amax(-1)
    assert clip_OG.shape == (24, 4)
    assert clip_OG.dtype == torch.float32
    assert (clip_OG <= largest_OG).all()
    assert (clip_OG >= largest_OG * min(CLIP_LIMITS) * (1 - 1e-6)).all()


def test_ties_go_to_plain_rounding() -> None:
    weight_OI = torch.randint(-7, 8, (8, 32)).float()
    weight_OI[:, 0], weight_OI[:, 1] = 7, -8
    scales_I = awq.search_scales(weight_OI, torch.zeros(4, 32), 32)
    assert torch.equal(scales_I, torch.ones(32)), "no input, no loss: nothing to choose by"
    exact_I = awq.search_scales(weight_OI, torch.randn(40, 32), 32)
    assert torch.equal(exact_I, torch.ones(32)), "codes hold these weights exactly"


def test_heads_that_share_a_value_channel_share_its_scale() -> None:
    text = Block()
    statistics = text.observed()
    fold = text.folds[1]
    search = awq.search_fold(text.block, fold, statistics[fold], SMALL)
    heads, shared, size = text.config.num_attention_heads, 2, text.config.head_dim
    assert search.scales_P.shape == (heads // shared * size,)
    scales_HE = fold.spread(search.scales_P).view(heads, size)
    assert torch.equal(scales_HE[0], scales_HE[1])
    assert not torch.equal(scales_HE[1], scales_HE[2])
    assert search.chosen.loss < search.trials[0].loss


@pytest.mark.parametrize("recipe", [SMALL, replace(PAPER, group_size=32)], ids=["default", "paper"])
def test_order_of_samples_changes_nothing(recipe: Recipe) -> None:
    text, shuffled = Block(), Block()
    shuffled.hidden_BLD = text.hidden_BLD[[2, 0, 1]]
    first = awq.quantize_block(text.block, text.observed(), recipe)
    second = awq.quantize_block(shuffled.block, shuffled.observed(), recipe)
    for one, other in zip(first.searches, second.searches, strict=True):
        assert one.chosen[:2] == other.chosen[:2]
        torch.testing.assert_close(one.scales_P, other.scales_P, rtol=1e-3, atol=0)
    for name, layer in first.layers.items():
        other_OI = second.layers[name].quantized.codes_OI
        assert (layer.quantized.codes_OI != other_OI).float().mean() < 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize("recipe", [DEFAULT, PAPER, replace(DEFAULT, compensate=True)])
def test_broken_activations_mean_plain_rounding_and_a_note(value: float, recipe: Recipe) -> None:
    text = Block()
    text.block.mlp.up_proj.bias = nn.Parameter(torch.zeros(256), requires_grad=False)
    text.block.mlp.up_proj.bias[0] = value
    plain_OI = Rounding(32).plain(text.block.mlp.down_proj.weight)
    result = awq.quantize_block(text.block, text.observed(), replace(recipe, group_size=32))
    notes = [search.note for search in result.searches]
    assert notes[:2] == ["", ""]
    assert "NaN" in notes[3]
    assert torch.equal(result.searches[3].scales_P, torch.ones(256))
    assert torch.equal(dequantize(result.layers["mlp.down_proj"].quantized, torch.float32), plain_OI)


def test_dead_channels_keep_their_scale_and_are_told() -> None:
    text = Block()
    text.block.input_layernorm.weight.data[5:9] = 0
    fold = text.folds[0]
    search = awq.search_fold(text.block, fold, text.observed()[fold], SMALL)
    assert torch.equal(search.scales_P[5:9], torch.ones(4))
    assert search.note == "4 channels are never active"
    assert search.scales_P.isfinite().all()


@pytest.mark.parametrize("recipe", [DEFAULT, PAPER, replace(DEFAULT, compensate=True)])
def test_groups_of_zeros_and_one_token_are_handled(recipe: Recipe) -> None:
    text = Block(rows=1)
    text.hidden_BLD = text.hidden_BLD[:, :1]
    text.rope = tuple(table_BLE[:, :1] for table_BLE in text.rope)
    for parameter in text.block.parameters():
        if parameter.ndim == 2:
            parameter.data[:, :32] = 0
    result = awq.quantize_block(text.block, text.observed(), replace(recipe, group_size=32))
    assert text.run().isfinite().all()
    assert all(layer.quantized.scales_OG.isfinite().all() for layer in result.layers.values())


def test_whole_rows_can_be_one_group() -> None:
    text = Block()
    result = awq.quantize_block(text.block, text.observed(), replace(DEFAULT, group_size=-1))
    assert result.layers["mlp.down_proj"].quantized.scales_OG.shape == (128, 1)


def test_a_paper_recipe_leaves_q_and_k_unclipped_by_exact_name() -> None:
    text = Block()
    statistics = text.observed()
    result = awq.quantize_block(text.block, statistics, replace(PAPER, group_size=32))
    layers = result.layers
    assert layers["self_attn.q_proj"].loss == layers["self_attn.q_proj"].plain_loss
    assert layers["self_attn.k_proj"].loss == layers["self_attn.k_proj"].plain_loss
    assert layers["self_attn.v_proj"].loss != layers["self_attn.v_proj"].plain_loss
