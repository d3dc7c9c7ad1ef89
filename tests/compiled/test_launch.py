"""Tiles are what Triton takes: powers of two, and neither less nor more than the work."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniawq.compiled import launch as tiles

SIZES, ROWS = st.integers(1, 1 << 18), st.integers(1, 300)
THREADS = 32


def blocks_of(tile):
    return {name: size for name, size in tile.items() if name.endswith("BLOCK")}


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@given(st.dictionaries(st.sampled_from("xyz"), SIZES, min_size=1))
def test_pointwise_tiles_fit_what_they_cover(sizes):
    tile = tiles.block_sizes("pointwise", sizes, sums=0)
    blocks = blocks_of(tile)
    assert blocks.keys() == {f"{name.upper()}BLOCK" for name in sizes}
    assert all(is_power_of_two(block) for block in blocks.values())
    assert all(blocks[f"{name.upper()}BLOCK"] < 2 * size for name, size in sizes.items())
    assert prod(blocks.values()) <= tiles.MOST_ELEMENTS
    assert tile["num_warps"] in (1, 2, 4)
    assert tile["num_warps"] == 1 or prod(blocks.values()) >= THREADS * tile["num_warps"]


@pytest.mark.parametrize(("sizes", "blocks"), [
    ({"x": 98304}, (512,)), ({"x": 6144}, (128,)), ({"y": 4096, "x": 16}, (16, 16)), ({"y": 8, "x": 8192}, (8, 32)),
    ({"y": 1792, "x": 128}, (32, 32)),
])  # fmt: skip
def test_pointwise_tiles_of_a_decode_step(sizes, blocks):
    """About two programs for each multiprocessor of an H100, and both sides of a transposition in one tile."""
    assert sorted(blocks_of(tiles.pointwise_tile(sizes)).values()) == sorted(blocks)


@given(st.dictionaries(st.sampled_from("yz"), SIZES), st.integers(1, 64), SIZES, st.integers(1, 3))
def test_a_program_knows_its_share_of_every_dimension(more, x, summands, sums):
    sizes = {"x": x, "r0_": summands} | more
    for kind in ("vectors", "dot", "dense dot", "sum"):
        rows = sizes | {"x": tiles.columns_for(x)} if kind == "dot" else sizes
        tile = tiles.block_sizes(kind, rows, sums=sums, words=16)
        assert blocks_of(tile).keys() >= {f"{name.upper()}BLOCK" for name in sizes}


@given(SIZES)
def test_sums_have_a_program_of_their_own_unless_they_are_short(summands):
    tile = tiles.block_sizes("sum", {"x": 7, "r0_": summands}, sums=0)
    assert is_power_of_two(tile["R0_BLOCK"])
    assert is_power_of_two(tile["XBLOCK"])
    assert tile["R0_BLOCK"] >= min(summands, tiles.MOST_SUMMANDS_AT_ONCE)
    assert THREADS * tile["num_warps"] <= tile["R0_BLOCK"] * tile["XBLOCK"]
    assert tile["XBLOCK"] == 1 or tile["R0_BLOCK"] < THREADS


def test_rows_take_the_narrowest_tile_that_holds_them():
    assert [tiles.columns_for(rows) for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128)] == [
        8, 8, 16, 16, 32, 32, 64, 64, 64, 64,
    ]  # fmt: skip


@given(st.integers(1, 1 << 14), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 224), ROWS)
def test_splits_are_parts_of_the_groups_in_whole_steps(blocks, words, groups, rows):
    splits = tiles.splits_for((blocks, 8, groups * 16 // words, words), rows)
    assert groups % splits == 0 or groups * 16 // words % splits == 0
    assert groups * 16 // splits % tiles.WORDS_OF_A_SUM == 0


@pytest.mark.parametrize(("outputs", "groups", "rows", "splits"), [
    (28672, 32, 8, 1), (6144, 32, 8, 8), (4096, 112, 8, 8), (28672, 32, 16, 1), (4096, 32, 16, 8), (28672, 32, 32, 1),
    (28672, 32, 64, 1), (6144, 32, 64, 4), (4096, 32, 64, 8), (6144, 32, 128, 2), (4096, 112, 128, 4),
    (28672, 32, 256, 1), (6144, 32, 256, 2), (4096, 32, 256, 4), (4096, 112, 256, 4),
])  # fmt: skip
def test_splits_are_what_was_fastest_on_an_h200(outputs, groups, rows, splits):
    """Or within a few per cent of it."""
    assert tiles.splits_for((outputs // 8, 8, groups, 16), rows) == splits


@given(st.integers(1, 1 << 12), st.integers(1, 3))
def test_parts_are_whole_warps_of_vectors(vectors, rows):
    parts = tiles.parts_for(vectors, rows)
    assert vectors % parts == 0
    assert parts == 1 or (rows == 1 and vectors // parts % THREADS == 0)


@given(SIZES, st.integers(1, 1 << 12), st.integers(1, 3))
def test_a_thread_of_vectors_keeps_its_words_in_registers(outputs, vectors, rows):
    parts = tiles.parts_for(vectors, rows)
    tile = tiles.block_sizes("vectors", {"x": outputs, "r0_": vectors // parts}, sums=rows)
    assert is_power_of_two(tile["XBLOCK"])
    assert tile["R0_BLOCK"] == THREADS * tile["num_warps"]
    assert 4 * parts * tile["XBLOCK"] <= 64
