"""Learned codes: no step raises the loss, codes stay beside their weights, and a resumed run sees the same text."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miniawq import awq
from miniawq.awq import Rounding, Statistics
from miniawq.checkpoint.blocks import BlockStream
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.errors import MiniawqError
from miniawq.packing import Quantized, dequantize
from miniawq.quantize import job as job_file
from miniawq.quantize import report
from miniawq.quantize.descent import chosen_errors, descended, errors_beside
from miniawq.quantize.factors import coarse_to_fine
from miniawq.quantize.grids import GRIDS
from miniawq.quantize.job import Quantizer, Settings, quantize_checkpoint
from miniawq.quantize.neighbours import neighbouring_codes, trust
from miniawq.quantize.ranges import shrunk
from miniawq.quantize.recipes import DEFAULT, NEIGHBOURS, Recipe
from miniawq.quantize.streams import Aim, Streams
from miniawq.quantize.verify import ROUNDING, error_over_bound
from tests.helpers.awq_blocks import Block, layer_and_inputs, statistics_of
from tests.helpers.marks import thorough_but
from tests.helpers.quantizing import contents, killed, some_text
from tests.helpers.tiny_checkpoints import FAMILIES, make_dense

SETTINGS = Settings(replace(NEIGHBOURS, group_size=64, ratios=4), shard_bytes=40_000)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_report", lambda path, blocks: None)


def aim_of(x_TI: Tensor, distance_TO: Tensor) -> Aim:
    aim = Aim(torch.zeros(distance_TO.shape[1], x_TI.shape[1]))
    aim.miss(x_TI, distance_TO)
    shared = statistics_of(x_TI)
    shared.tokens = len(x_TI)
    return aim.over(shared)  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8, 64]))
def test_no_choice_raises_the_loss_and_the_last_is_the_best(seed: int, size: int) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    weight_SO, moments_SS = weight_OI.t()[:size].contiguous(), statistics_of(x_TI).moments_II[:size, :size]
    pull_SO = torch.randn(size, 24, generator=torch.Generator().manual_seed(seed)) * moments_SS.diagonal().mean()
    quantized = Rounding(size).codes(weight_SO.t(), Rounding(size).ranges(weight_SO.t()))
    lower_SO, upper_SO = errors_beside(weight_SO, quantized.scales_OG[:, 0], quantized.zeros_OG[:, 0].float())

    def losses(error_SO: Tensor) -> Tensor:
        error_SO, moments, pull = error_SO.double(), moments_SS.double(), pull_SO.double()
        return (error_SO * (moments @ error_SO + 2 * pull)).sum(0)

    error_SO = dequantize(quantized, torch.float32).t() - weight_SO
    for _ in range(3):
        before_O = losses(error_SO)
        error_SO = descended(chosen_errors, moments_SS, error_SO, pull_SO + moments_SS @ error_SO, lower_SO, upper_SO)
        slack_O = 1e-5 * (before_O.abs() + (pull_SO.double() * (upper_SO - lower_SO)).abs().sum(0))
        assert (losses(error_SO) <= before_O + slack_O).all()
    for one_SO in (lower_SO, upper_SO):
        other_SO = error_SO.clone()
        other_SO[-1] = one_SO[-1]
        assert (losses(error_SO) <= losses(other_SO) + slack_O).all(), "nothing was chosen after the last column"


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([16, 32, 64]),
    st.sampled_from(["asymmetric", "symmetric"]),
    st.sampled_from(["plain", "one sign", "zeros", "tiny", "clipped", "whole numbers"]),
)
def test_every_code_is_beside_its_weight(seed: int, group_size: int, grid: str, kind: str) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    changes = {
        "one sign": weight_OI.abs() + 1,
        "zeros": weight_OI * (torch.arange(64) >= 16),
        "tiny": weight_OI * 1e-7,
        "whole numbers": (weight_OI * 10).round().clamp(-8, 7),
    }
    weight_OI, rounding = changes.get(kind, weight_OI), Rounding(group_size, GRIDS[grid])
    ranges_OG2 = rounding.ranges(weight_OI) * (0.6 if kind == "clipped" else 1)
    nearest = rounding.codes(weight_OI, ranges_OG2)
    found = neighbouring_codes(weight_OI, nearest, aim_of(x_TI, torch.randn(50, 24)))
    assert torch.equal(found.zeros_OG, nearest.zeros_OG)
    assert found.codes_OI.max() <= 15
    assert error_over_bound(weight_OI, found, reach=1.0) <= 1 + ROUNDING
    if kind == "plain":
        assert error_over_bound(weight_OI, found) > 1.5, "some codes are not the nearest"


def test_the_bound_sees_a_code_that_is_not_beside_its_weight() -> None:
    weight_OI, x_TI = layer_and_inputs(0)
    rounding = Rounding(16)
    found = neighbouring_codes(weight_OI, rounding.codes(weight_OI, rounding.ranges(weight_OI)), statistics_of(x_TI))
    scales_OI, zeros_OI = (some.repeat_interleave(16, 1).double() for some in found[1:])
    off_OI = (found.codes_OI - zeros_OI) - weight_OI / scales_OI
    away_OI = off_OI.sign().int()
    codes_OI = found.codes_OI.int()
    unclipped_OG = (off_OI.abs() < 1).unflatten(1, (-1, 16)).all(-1)
    movable_OI = unclipped_OG.repeat_interleave(16, 1) & (off_OI.abs() > 0.01)
    movable_OI &= (codes_OI + away_OI >= 0) & (codes_OI + away_OI <= 15)
    assert movable_OI.sum() > 100
    for row, column in movable_OI.nonzero()[:20].tolist():
        wrong_OI = codes_OI.clone()
        wrong_OI[row, column] += away_OI[row, column]
        wrong = Quantized(wrong_OI.to(torch.uint8), found.scales_OG, found.zeros_OG)
        assert error_over_bound(weight_OI, wrong, reach=1.0) > 1 + ROUNDING


@given(st.integers(0, 10**6))
def test_an_aim_gives_the_distance_on_the_text(seed: int) -> None:
    weight_OI, x_TI = layer_and_inputs(seed)
    wanted_TO = torch.randn(50, 24, generator=torch.Generator().manual_seed(seed))
    aim = aim_of(x_TI, x_TI @ weight_OI.t() - wanted_TO)
    error_OI = Rounding(16).plain(weight_OI) - weight_OI
    distance_O = (x_TI @ (weight_OI + error_OI).t() - wanted_TO).square().mean(0)
    torch.testing.assert_close(aim.losses(error_OI), distance_O, rtol=1e-3, atol=1e-4)


def test_learned_codes_gain_where_nearest_ones_do_not() -> None:
    weight_OI, x_TI = layer_and_inputs(5, outputs=64, inputs=128, tokens=2000)
    aim = aim_of(x_TI, 0.3 * x_TI @ torch.randn(128, 64))
    layers = [
        awq.quantize_layer("mlp.up_proj", weight_OI, aim, one.rounding, one.method)
        for one in (replace(DEFAULT, group_size=32), replace(NEIGHBOURS, group_size=32))
    ]
    assert layers[1].loss < 0.9 * layers[0].loss


def test_a_device_finds_codes_that_lose_no_more(device: torch.device) -> None:
    for outputs in (64, 40, 64):  # a GPU records a shape when it meets it again
        weight_OI, x_TI = layer_and_inputs(outputs, outputs, inputs=128, tokens=2000)
        aim = aim_of(x_TI, 0.3 * x_TI @ torch.randn(128, outputs))
        nearest = Rounding(32).codes(weight_OI, Rounding(32).ranges(weight_OI))
        here = copy.deepcopy(aim)
        for name in ("moments_II", "magnitude_I", "pull_OI", "missed_O"):
            setattr(here, name, getattr(here, name).to(device))
        found = neighbouring_codes(weight_OI.to(device), Quantized(*(part.to(device) for part in nearest)), here)
        found = Quantized(*(part.cpu() for part in found))
        expected = neighbouring_codes(weight_OI, nearest, aim)
        losses = [float(aim.losses(dequantize(one, torch.float32) - weight_OI).sum()) for one in (found, expected)]
        assert losses[0] <= 1.001 * losses[1]
        assert (found.codes_OI != expected.codes_OI).float().mean() < 0.02
        assert error_over_bound(weight_OI, found, reach=1.0) <= 1 + ROUNDING


def test_a_row_that_loses_by_its_codes_gets_plain_ones() -> None:
    weight_OI, x_TI = layer_and_inputs(1)
    statistics, recipe = statistics_of(x_TI), replace(NEIGHBOURS, group_size=16)

    def wrong_in_odd_rows(weight_OI: Tensor, nearest: Quantized, statistics: Statistics) -> Quantized:
        found = neighbouring_codes(weight_OI, nearest, statistics)
        found.codes_OI[1::2] = 15 - found.codes_OI[1::2]
        return found

    method = recipe.method._replace(codes=wrong_in_odd_rows)
    layer = awq.quantize_layer("mlp.up_proj", weight_OI, statistics, recipe.rounding, method)
    plain_OI = dequantize(recipe.rounding.codes(weight_OI, recipe.rounding.ranges(weight_OI)), torch.float32)
    stored_OI = dequantize(layer.quantized, torch.float32)
    assert torch.equal(stored_OI[1::2], plain_OI[1::2])
    assert (statistics.losses(stored_OI - weight_OI) <= statistics.losses(plain_OI - weight_OI)).all()
    assert not torch.equal(stored_OI[::2], plain_OI[::2])


def test_factors_are_taken_where_they_are_decisive() -> None:
    text, gains = Block(), []
    for fold, seen in text.observed().items():
        everywhere = coarse_to_fine(DEFAULT.formulas, 8, 4)(text.block, fold, seen, DEFAULT.rounding)
        plain, first = everywhere.trials[0], [trial for trial in everywhere.trials if trial.ratio in (0, 0.5, 1)]
        best = min(trial.loss for trial in first) / plain.loss
        taken, left = (
            coarse_to_fine(DEFAULT.formulas, 8, 4, worth * best)(text.block, fold, seen, DEFAULT.rounding)
            for worth in (1.001, 0.999)
        )
        assert taken.trials == everywhere.trials
        assert torch.equal(taken.factors_P, everywhere.factors_P)
        assert left.trials == [plain]
        assert (left.factors_P == 1).all()
        gains.append(1 - best)
    assert max(gains) > 0
    assert NEIGHBOURS.method.factors.keywords["worth"] < 1 == DEFAULT.method.factors.keywords["worth"]


def test_trust_grows_with_the_text() -> None:
    assert trust(256, 0) < trust(256, 1000) < trust(256, 10**6) < 1
    assert trust(4864, 16384) < trust(896, 16384)
    moments_II = torch.randn(4, 4)
    assert torch.equal(shrunk(moments_II, 0.5).diagonal(), moments_II.diagonal())


@pytest.mark.parametrize("family", ["llama-biased", "qwen3"])
def test_aims_are_what_the_dense_block_gives(family: str, tmp_path: Path) -> None:
    source, model = make_dense(tmp_path / "dense", family, num_hidden_layers=1)
    stream, block = BlockStream(open_checkpoint(source)), model.model.layers[0]
    dense_BLD = torch.randn(3, 9, 128)
    streams = Streams(stream, dense_BLD, dense_BLD + 0.1 * torch.randn(3, 9, 128))
    ropes, _ = model.model.positions(0, 9, 9, None)
    rope = ropes[model.config.layer_ropes[0]]
    given_by = [[h_BLD + block.self_attn(block.input_layernorm(h_BLD), rope), block(h_BLD, rope)] for h_BLD in
                (streams.dense_BLD, streams.quantized_BLD)]  # fmt: skip
    for fold in awq.llama_folds(model.config):
        for name, aim in streams.aims(block, 0, fold).items():
            found_O = aim.losses(torch.zeros_like(block.get_parameter(f"{name}.weight")))
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                dense, ours = (outputs[name == "mlp.down_proj"] for outputs in given_by)
                torch.testing.assert_close(found_O, (ours - dense).square().mean((0, 1)), rtol=1e-4, atol=1e-6)
            if name == "self_attn.q_proj":
                dense, ours = (block.self_attn.q_proj(block.input_layernorm(h_BLD)) for h_BLD in
                               (streams.dense_BLD, streams.quantized_BLD))  # fmt: skip
                torch.testing.assert_close(found_O, (ours - dense).square().mean((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"intermediate_size": 200}),
        ("llama-biased", {}),
        ("qwen3", {}),
    ],
)
@pytest.mark.thorough
def test_the_second_stream_is_what_the_file_gives_also_when_resumed(
    family: str, changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases are divided, norms of heads and unpacked layers rounded to 16 bits: the file decides, not the memory."""
    source, _ = make_dense(tmp_path / "dense", family, num_hidden_layers=3, **changes)
    text, seen = some_text(), []
    begin = Streams.begin

    def watched(streams: Streams, hidden_BLD: Tensor) -> None:
        seen.append(streams.quantized_BLD.clone())
        begin(streams, hidden_BLD)

    monkeypatch.setattr(Streams, "begin", watched)
    quantize_checkpoint(source, tmp_path / "whole" / "out", text, SETTINGS)
    with killed(lambda _, name: name.startswith("model.layers.2.")):
        quantize_checkpoint(source, tmp_path / "out", text, SETTINGS)
    quantize_checkpoint(source, tmp_path / "out", text, SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    stream = BlockStream(open_checkpoint(tmp_path / "whole" / "out"))
    hidden_BLD = torch.empty(*text.tokens_BL.shape, 128)
    stream.embed(text.tokens_BL, hidden_BLD)
    for layer in range(2):
        ((_, hidden_BLD),) = stream.run(stream.block(layer), layer, hidden_BLD)
    assert torch.equal(seen[2], hidden_BLD)
    assert torch.equal(seen[-1], hidden_BLD), "the resumed run"


@pytest.mark.parametrize("family", thorough_but(["llama-biased"], FAMILIES))
def test_learned_checkpoints_are_verified_and_lose_no_more_than_plain_rounding(family: str, tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense", family)
    made = quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    assert 0.5 < made.verification["largest_error_over_bound"] <= 1 + ROUNDING
    layers = [layer for block in made.blocks for layer in block["layers"].values()]
    assert all(layer["loss"] <= layer["plain_loss"] * (1 + 1e-5) for layer in layers)


def test_a_recipe_of_nearest_codes_is_held_to_half_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = make_dense(tmp_path / "dense", num_hidden_layers=1)
    learned = SETTINGS.recipe.method
    monkeypatch.setattr(Recipe, "method", property(lambda recipe: learned))
    with pytest.raises(MiniawqError, match="times the bound away"):
        quantize_checkpoint(source, tmp_path / "out", some_text(), Settings(replace(DEFAULT, group_size=64)))


def test_only_recipes_that_learn_keep_a_second_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = make_dense(tmp_path / "dense", num_hidden_layers=1)
    monkeypatch.setattr(job_file, "Streams", lambda *_: pytest.fail("a second stream"))
    quantize_checkpoint(source, tmp_path / "out", some_text(), Settings(replace(DEFAULT, group_size=64)))
    assert Quantizer(open_checkpoint(source), SETTINGS, torch.device("cpu")).streams is None
