"""How kernels are cut into programs: the tiles that were fastest on an H100 or H200, or near it.

`scripts/bench_products.py` measures them. Nothing is searched: a search times each tile a few times beside other work,
and has been seen to take one three times slower than the best. It would also take most of the compile time.
"""

from collections.abc import Sequence
from math import ceil, log2, prod
from typing import NamedTuple

from miniawq.compiled.prepacked import LARGEST_GROUP
from miniawq.packing import CODES_PER_WORD

SUMMANDS_OF_A_WARP = 128
MOST_SUMMANDS_AT_ONCE = 4096
MULTIPROCESSORS = 132
MANY_SUMS = 112
FEWEST_ELEMENTS, MOST_ELEMENTS = 128, 1024

# What was fastest on an H200 where the rules of `summing_parts` and `block_sizes` were not
# (`scripts/bench_products.py`): parts for (groups, rows), and outputs of a program for (outputs, parts * groups, rows).
PARTS = {(64, 2): 2, (224, 1): 2, (112, 3): 8, (112, 4): 8}
OUTPUTS = {(4096, 128, 2): 2, (8192, 448, 1): 2}


class DotTile(NamedTuple):
    """The outputs of a program of `dot_planes`, and how many programs fit a multiprocessor."""

    outputs: int
    programs: int


# For the rows of a program. All take 32 words at a time, and load the next ones meanwhile.
DOT_TILES = {8: DotTile(32, 7), 16: DotTile(32, 7), 32: DotTile(64, 2), 64: DotTile(128, 1), 128: DotTile(64, 1)}
WORDS_AT_ONCE, STAGES = 32, 3
# What each further split costs, as a part of a round: for every row and output, by the words that an output has.
SUMMING = 5e-5
SPLITS, WORTH_MORE_SPLITS = (1, 2, 4), 1.2
# What was faster on an H100 than by that rule: splits for (outputs, groups, rows of a program).
FASTER_SPLITS = {(28672, 32, 16): 2}


def columns_for(rows: int) -> int:
    """The rows that a program of `dot_planes` takes, of so many."""
    return next((columns for columns in DOT_TILES if rows <= columns), max(DOT_TILES))


def summing_parts(groups: int, planes: int, rows: int | None = None) -> int:
    """In how many parts `reduce_planes` sums a group: so many that a warp has 128 summands of an output."""
    wanted = PARTS.get((groups, rows or 0), max(4, SUMMANDS_OF_A_WARP // groups))
    parts = 1
    while parts < wanted and planes % (2 * parts) == 0:
        parts *= 2
    return parts


def splits_for(shape_OPG: Sequence[int], rows: int) -> int:
    """In how many parts `dot_planes` sums: as few as come within a fifth of the shortest time.

    Programs that do not fit at once follow when the first have ended, so a time is a number of rounds, each as long as
    the sum of one program. Writing the sums of parts and reading them again takes its share of a round.
    """
    outputs, planes, groups = shape_OPG
    columns = columns_for(rows)
    if (outputs, groups, columns) in FASTER_SPLITS and planes == LARGEST_GROUP // CODES_PER_WORD:
        return FASTER_SPLITS[outputs, groups, columns]
    tile = DOT_TILES[columns]
    programs = ceil(outputs / tile.outputs) * ceil(rows / columns)
    summing = SUMMING * rows * outputs / (planes * groups)
    times = {
        splits: ceil(programs * splits / (MULTIPROCESSORS * tile.programs)) / splits + (splits - 1) * summing
        for splits in SPLITS
        if planes % splits == 0
    }
    return next(splits for splits, time in times.items() if time <= WORTH_MORE_SPLITS * min(times.values()))


def block_sizes(kind: str, sizes: dict[str, int], sums: int = 1) -> dict[str, int]:
    """The tile of one of Inductor's kernels, by what it computes and the sizes that it iterates over."""
    if kind == "planes":
        return planes_tile(sizes["x"], sizes["r0_"], sums)
    if kind == "dot":
        return dot_tile(sizes)
    if kind == "dense dot":
        return dense_dot_tile(sizes["x"])
    return sum_tile(sizes) if kind == "sum" else pointwise_tile(sizes)


def planes_tile(outputs: int, summands: int, sums: int) -> dict[str, int]:
    """For `reduce_planes`: a thread takes four neighbouring summands (one load) of a few outputs.

    It uses its activations for all of these, and a program takes all summands of its outputs. All words of a tile are
    loaded before the first is used, and 64 of them fit a thread's registers: four outputs, four planes. With 128 a
    kernel may be twenty times slower, because the assembler gives up and keeps 32 registers
    (`tests/compiled/test_counts.py`).
    """
    block = min(1024, max(SUMMANDS_OF_A_WARP, power_of_two(summands)))
    default = 2 if sums > 2 or (sums == 1 and block == SUMMANDS_OF_A_WARP) else 4
    outputs = OUTPUTS.get((outputs, summands, sums), default)
    return {"XBLOCK": outputs, "R0_BLOCK": block, "num_warps": block // SUMMANDS_OF_A_WARP, "num_stages": 1}


def dot_tile(sizes: dict[str, int]) -> dict[str, int]:
    """For `dot_planes`: 16 outputs a warp."""
    columns = min(sizes["x"], max(DOT_TILES))
    outputs = DOT_TILES[columns].outputs
    blocks = {"XBLOCK": columns, "YBLOCK": outputs, "R0_BLOCK": WORDS_AT_ONCE}
    return blocks | {"num_warps": outputs // 16, "num_stages": STAGES} | ({"ZBLOCK": 1} if "z" in sizes else {})


def dense_dot_tile(rows: int) -> dict[str, int]:
    """For `products.multiply_tiled`."""
    columns = columns_for(rows)
    outputs = 128 if columns > 16 else 64
    return {"XBLOCK": columns, "YBLOCK": outputs, "R0_BLOCK": 128, "num_warps": outputs // 16, "num_stages": STAGES}


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
    tile = {"XBLOCK": sums, "R0_BLOCK": block, "num_warps": warps, "num_stages": 1}
    return tile | ({"YBLOCK": 1} if "y" in sizes else {})


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
