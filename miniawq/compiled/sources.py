"""What is changed in the Triton sources that Inductor writes. A source that looks different from what is known stays.

Inductor's blocks are XBLOCK, YBLOCK and R0_BLOCK, its indices x, y and r0, of columns, rows and summands.
"""

import re
from collections.abc import Iterator

from miniawq.compiled.operations import PARTS_OF_A_SUM, SUMMED_AT_ONCE

# Inductor's dimensions, counted from the last: sums, columns, rows.
INTO_TWO_DIMENSIONS = (
    (re.compile(r"\[(?:None, )*:, None, None\]"), "[:, None]"),
    (re.compile(r"\[(?:None, )+:, None\]|\[(?:None, )+:\]"), "[None, :]"),
    (re.compile(r"\[1(?:, 1)+\]"), "[1, 1]"),
    (re.compile(r"\[(?:None,)?:,:,None\]"), ""),
)
ACCUMULATOR = re.compile(r"(_tmp\d+) = tl\.full\((\[.*?\])")
COLUMNS = re.compile(r"\bx(?:index|mask|\d+)\b")
SUMMANDS = re.compile(r"\br0_(?:index|codes|parts|\d+)\b")
LOOP = re.compile(r"    for r0_offset in .*\n(?:        .*\n|\n)+")
STEP = re.compile(r"'R0_BLOCK': (\d+)")
CODES_JOINED = "tl.join("
LOAD = re.compile(
    r"(?P<space> +)(?P<name>tmp\d+) = tl\.load\((?P<memory>\w+) \+ \((?:(?P<first>\d+) \+ )?(?P<index>.*)\), "
    r"(?P<mask>[\w& ]+), eviction_policy='\w+'(?P<other>, other=0\.0)?\)\n"
)
STRIDE = re.compile(r"\b([24])\*r0_\d+\b")


def with_matrices(source: str) -> str:
    """The source of a kernel of products, with operands that are matrices, and sums that stay in the accumulator.

    Inductor loads operands with a dimension for each of the result's, [Y, 1, R] and [1, X, R], and reshapes them before
    the product. Then Triton does not know how the tensor cores read a tile, and lays it into shared memory row by row:
    eight rows of 32 words begin in the same bank. It also adds the products of a step to the accumulator afterwards,
    where they might have begun with it.
    """
    flat = source
    for pattern, replacement in INTO_TWO_DIMENSIONS:
        flat = pattern.sub(replacement, flat)
    loops = list(LOOP.finditer(flat))
    if len(loops) != 1 or "r0_codes" in source:
        return source
    head, loop, tail = flat[: loops[0].start()], loops[0][0], flat[loops[0].end() :]
    of_columns = [line for line in head.splitlines(keepends=True) if COLUMNS.search(line)]
    columns = [line for line in of_columns if COLUMNS.match(line.strip())]
    accumulators = ACCUMULATOR.findall(head)
    if len(accumulators) != 1 or accumulators[0][1] != "[YBLOCK, XBLOCK]":
        return source
    ((accumulator, _),) = accumulators
    if CODES_JOINED in loop:
        summed = with_numbers_of_groups(loop, *STEP.findall(source))
    else:
        if columns != of_columns:
            return source
        summed, begun = re.subn(r"(tl\.dot\(tmp\d+, tmp\d+)", rf"\1, {accumulator}", loop, count=1)
        summed, kept = re.subn(rf"= {accumulator} \+ (tmp\d+)", r"= \1", summed)
        if begun != 1 or kept != 1:
            return source
    # The right operand's tile has the columns as its rows.
    renamed = (in_right_operand(line.replace("[None, :]", "[:, None]")) for line in columns)
    lines = (in_right_operand(line) if SUMMANDS.search(line) else line for line in summed.splitlines(keepends=True))
    return "".join([head, *renamed, *lines, tail])


def in_right_operand(line: str) -> str:
    """With columns of its own names."""
    return COLUMNS.sub(r"\g<0>_R", line)


def with_numbers_of_groups(loop: str, step: str) -> str:
    """The loop of a product whose sums are scaled, of codes.

    All of a step belongs to the same groups, so what belongs to a group is loaded once, not for each of its summands;
    and all numbers of the right operand and all parts of a sum are loaded, where Inductor knows of one for each word.
    """
    first, *others = re.sub(rf"\br0_(?:index|\d+) // {step}\b", f"r0_offset // {step}", loop).splitlines(keepends=True)
    of_codes = r"\b8\*r0_(?:index|\d+)\b"
    of_parts = rf"\(\(r0_(?:index|\d+) % {PARTS_OF_A_SUM}\)\)"
    indices = (
        "        r0_codes = 8*r0_offset + tl.arange(0, 8 * R0_BLOCK)[None, :]\n",
        f"        r0_parts = tl.arange(0, {SUMMED_AT_ONCE})[None, :]\n",
    )
    others = [re.sub(of_parts, "r0_parts", re.sub(of_codes, "r0_codes", line)) for line in others]
    return "".join([first, *indices, *others])


def with_wide_loads(source: str) -> str:
    """The source of a kernel of sums, in which loads of two or four neighbours become one.

    Inductor writes one load for each of them, every second or fourth number from memory. As one, of a tile as many
    times as long, a thread gets its neighbours at once, and threads side by side read what lies side by side.
    """
    return source if "YBLOCK" in source else LOOP.sub(lambda loop: loop_with_wide_loads(loop[0]), source)


def loop_with_wide_loads(loop: str) -> str:
    """One loop of it."""
    loads: dict[tuple[int, str, int, str, str], dict[int, re.Match[str]]] = {}
    for load in LOAD.finditer(loop):
        if stride := STRIDE.search(load["index"]):
            size, first = int(stride[1]), int(load["first"] or 0)
            whole = (size, load["memory"], first // size, load["index"], load["mask"])
            loads.setdefault(whole, {})[first % size] = load
    for (size, *_), neighbours in loads.items():
        if len(neighbours) == size:
            first_of_all, *others = sorted(neighbours.values(), key=re.Match.start)
            loop = loop.replace(first_of_all[0], "".join(wide_load(size, neighbours)))
            for other in others:
                loop = loop.replace(other[0], "")
    return loop


def wide_load(size: int, neighbours: dict[int, re.Match[str]]) -> Iterator[str]:
    """The lines that load all neighbours at once and give each its name."""
    names = [neighbours[place]["name"] for place in range(size)]
    space, _, memory, first, index, mask, other = neighbours[0].groups(default="")
    of_outputs = COLUMNS.search(index) is not None
    # What belongs to the outputs of a program is read once; activations are read by every program.
    outputs, policy = ("XBLOCK", "evict_first") if of_outputs else ("1", "evict_last")
    index = STRIDE.sub("r0_wide", f"{first or 0} + {index}")
    mask, wide = mask.replace("r0_mask", f"(r0_wide < {size}*r0_numel)"), f"{names[0]}_wide"
    yield f"{space}r0_wide = {size}*r0_offset + tl.arange(0, {size} * R0_BLOCK)[None, :]\n"
    yield f"{space}{wide} = tl.load({memory} + ({index}), {mask}, eviction_policy='{policy}'{other})\n"
    if size == 2:
        yield f"{space}{names[0]}, {names[1]} = tl.split(tl.reshape({wide}, [{outputs}, R0_BLOCK, 2]))\n"
    else:
        yield f"{space}{wide}_even, {wide}_odd = tl.split(tl.reshape({wide}, [{outputs}, R0_BLOCK, 2, 2]))\n"
        yield f"{space}{names[0]}, {names[2]} = tl.split({wide}_even)\n"
        yield f"{space}{names[1]}, {names[3]} = tl.split({wide}_odd)\n"
