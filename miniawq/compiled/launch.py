"""How kernels are cut into programs: the tiles that were fastest on an H100 or H200, or near it.

`scripts/bench_products.py` measures them. Nothing is searched: a search times each tile a few times beside other work,
and has been seen to take one three times slower than the best. It would also take most of the compile time.
"""

from collections.abc import Sequence
from math import ceil, log2, prod
from typing import NamedTuple

from miniawq.compiled.prepacked import LARGEST_GROUP

# At least, of `dot_groups` and `dot_weights`.
WORDS_OF_A_STEP = 8
WORDS_OF_A_SUM = 16  # at least and in multiples, because Inductor masks sums of fewer
THREADS_OF_A_WARP = 32
MOST_SUMMANDS_AT_ONCE = 4096
MOST_VECTORS = 128
MULTIPROCESSORS = 132
MANY_SUMS = 112
FEWEST_ELEMENTS, MOST_ELEMENTS = 128, 1024


class DotTile(NamedTuple):
    """Of `dot_groups` or `dot_weights`: outputs, warps and stages of a program; with fewer programs sums are split."""

    outputs: int
    warps: int
    stages: int
    programs: int


PARTS = (7, 4, 2)
# For the rows of a program. All take one group at a time, or a few small ones, and load the next ones meanwhile. The
# last is for `dot_weights`.
DOT_TILES = {
    8: DotTile(64, 2, 4, 400),
    16: DotTile(128, 4, 4, 200),
    32: DotTile(128, 4, 4, 200),
    64: DotTile(128, 4, 4, 190),
    256: DotTile(128, 8, 3, 90),
}
MOST_ROWS_IN_GROUPS = 128  # of `dot_groups`
DENSE_STAGES = 3
SPLITS = (1, 2, 4, 8)


def columns_for(rows: int) -> int:
    """The rows that a program of `dot_groups` or `dot_weights` takes, of so many."""
    *of_groups, of_weights = DOT_TILES
    if rows > MOST_ROWS_IN_GROUPS:
        return of_weights
    return next((columns for columns in of_groups if rows <= columns), of_groups[-1])


def parts_for(vectors: int, rows: int) -> int:
    """In how many parts `reduce_vectors` takes a row of vectors: in several if it is alone, and warps stay full."""
    possible = PARTS if rows == 1 else ()
    return next((parts for parts in possible if vectors % (parts * THREADS_OF_A_WARP) == 0), 1)


def splits_for(shape_KWGP: Sequence[int], rows: int) -> int:
    """In how many parts tensor cores sum: so many that there are enough programs, if the groups can be shared out."""
    blocks, lanes, groups, words = shape_KWGP
    columns = columns_for(rows)
    tile = DOT_TILES[columns]
    programs = ceil(blocks * lanes / tile.outputs) * ceil(rows / columns)
    possible = [splits for splits in SPLITS if groups % splits == groups * words // splits % WORDS_OF_A_SUM == 0]
    return next((splits for splits in possible if programs * splits >= tile.programs), possible[-1])


def block_sizes(kind: str, sizes: dict[str, int], sums: int = 1, words: int = 0) -> dict[str, int]:
    """The tile of one of Inductor's kernels, by what it computes and the sizes that it iterates over.

    `sums` are those of words, and `words` are those of a group, where a kernel reads any. Of a dimension that its kind
    does not cut, a program takes one place.
    """
    return {f"{name.upper()}BLOCK": 1 for name in sizes} | _tile(kind, sizes, sums, words)


def _tile(kind: str, sizes: dict[str, int], sums: int, words: int) -> dict[str, int]:
    if kind == "vectors":
        return vectors_tile(sizes["x"], sizes["r0_"], sums)
    if kind == "dot":
        return dot_tile(sizes, words)
    if kind == "dense dot":
        return dense_dot_tile(sizes["x"])
    return sum_tile(sizes) if kind == "sum" else pointwise_tile(sizes)


def vectors_tile(outputs: int, summands: int, sums: int) -> dict[str, int]:
    """For `reduce_vectors`: a thread takes the same vector of a few outputs, and uses its activations for all of these.

    All words of a step are loaded before the first is used, and 64 of them fit a thread's registers. With 128 a kernel
    may be twenty times slower, because the assembler gives up and keeps 32 registers
    (`tests/compiled/test_counts.py`).
    """
    if sums == 1:
        block, wanted = min(MOST_VECTORS, power_of_two(summands)), 4 if summands == THREADS_OF_A_WARP else 2
    else:
        block, wanted = min(MOST_VECTORS // 2, power_of_two(summands)), 8 if summands <= MOST_VECTORS else 4
    block = max(THREADS_OF_A_WARP, block)
    warps = block // THREADS_OF_A_WARP
    return {"XBLOCK": min(wanted, power_of_two(outputs)), "R0_BLOCK": block, "num_warps": warps, "num_stages": 1}


def dot_tile(sizes: dict[str, int], words: int) -> dict[str, int]:
    """For tensor cores: a step is one group, or as many small ones as they sum at once."""
    columns = columns_for(sizes["x"])
    outputs, warps, stages, _ = DOT_TILES[columns]
    blocks = {"XBLOCK": columns, "YBLOCK": outputs, "R0_BLOCK": max(words, WORDS_OF_A_STEP)}
    return blocks | {"num_warps": warps, "num_stages": stages}


def dense_dot_tile(rows: int) -> dict[str, int]:
    """For `products.multiply_tiled`."""
    columns = columns_for(rows)
    outputs = 128 if columns > 16 else 64
    blocks = {"XBLOCK": columns, "YBLOCK": outputs, "R0_BLOCK": 128}
    return blocks | {"num_warps": outputs // 16, "num_stages": DENSE_STAGES}


def sum_tile(sizes: dict[str, int]) -> dict[str, int]:
    """One program for each sum, with one summand for a thread, or eight if it is as long as a row.

    Such a kernel takes as long as its loads are on their way. A warp takes several sums of less than a warp's summands,
    and a program four sums of a group where they leave about as many programs as one row of 4096 has. Of many long sums
    a thread takes twice as many summands.
    """
    summands = sizes["r0_"]
    block = min(MOST_SUMMANDS_AT_ONCE, power_of_two(summands))
    sums, warps = max(1, 32 // block), min(16, max(1, block // 32))
    if sizes["x"] >= MANY_SUMS and summands == LARGEST_GROUP:
        sums, warps = 4, 8
    elif sizes["x"] >= MANY_SUMS and block == MOST_SUMMANDS_AT_ONCE:
        warps = 8
    return {"XBLOCK": sums, "R0_BLOCK": block, "num_warps": warps, "num_stages": 1}


def pointwise_tile(sizes: dict[str, int]) -> dict[str, int]:
    """About two programs for each multiprocessor, of one to four warps; in two dimensions as square as they allow."""
    wanted = power_of_two(prod(sizes.values()) // (2 * MULTIPROCESSORS))
    elements = min(MOST_ELEMENTS, max(FEWEST_ELEMENTS, wanted))
    tile: dict[str, int] = {}
    # The smallest dimension first, because what it does not use is left to the others.
    for name in sorted(sizes, key=sizes.__getitem__):
        share = 1 << round(log2(elements) / (len(sizes) - len(tile)))
        tile[f"{name.upper()}BLOCK"] = block = min(power_of_two(sizes[name]), share)
        elements //= block
    return tile | {"num_warps": max(1, min(4, prod(tile.values()) // 128)), "num_stages": 1}


def power_of_two(number: int) -> int:
    """The next, or the number itself."""
    return 1 << max(0, number - 1).bit_length()
