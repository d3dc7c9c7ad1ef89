"""The INT4 product as expressions that `torch.compile` turns into one fast kernel each.

    rows      form                                                       where
    1..3      `reduce_planes`: multiply and sum, float32                 CUDA
    4..64     `dot_planes`: eight tensor-core products, one a nibble     CUDA
    more      `arrange.expand`, then the library's matmul                CUDA

Those of a CPU are in `cpu_forms.py`.

A form is a pure function of tensors, arranged as in `arrange.py`, to be called inside a larger compiled function;
`compiled` compiles it alone.

Shapes: O outputs, I inputs, G groups, P planes (S / 8), N nibbles (8), J = P G words of one output, T rows, K splits.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from miniawq.arrange import pack_grid, sequential_words, unpack_grid
from miniawq.packing import CODES_PER_WORD

log = logging.getLogger(__name__)

# Where `reduce_planes` finds nibble i: shift the word right by the first number, then the nibble begins at the second.
# Bit 16 is the last in place, because bit 23 of a float begins its exponent.
SUBNORMAL_PLACES = ((0, 0), (0, 4), (0, 8), (0, 12), (0, 16), (12, 8), (12, 12), (12, 16))
PRESCALE = 80
keeps_subnormals = True
SUMMANDS_OF_A_WARP = 128
MOST_SUMMANDS_AT_ONCE, MOST_SHORT_SUMS = 1024, 1 << 14

# What was fastest on an H200 where the rules of `parts_for` and `block_sizes` were not (`scripts/gpu_kernels.py`):
# parts for (groups, rows), and outputs of a program for (outputs, parts * groups, rows).
PARTS = {(64, 2): 2, (224, 1): 2, (112, 3): 8, (112, 4): 8}
OUTPUTS = {(4096, 128, 2): 2, (8192, 448, 1): 2}

# Outputs and words of a program of `dot_planes`, and stages of its loads, for its rows.
DOT_TILES = {8: (64, 64, 2), 16: (32, 32, 3), 32: (64, 16, 3)}

# Where `dot_planes` finds nibble i: shift the word left (right where negative), then the nibble begins at bit 12 or 16.
MAGIC_PLACES = ((16, 16), (8, 12), (8, 16), (0, 12), (0, 16), (-8, 12), (-8, 16), (-12, 16))


def planes(words_OPG: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Views [O, V, G] of the words, one for each step of `reduce_planes`: plane q part v is word q V + v of a group."""
    return words_OPG.unflatten(1, (-1, parts)).unbind(1)


@cache
def prove(device: torch.device) -> None:
    """See whether a compiled `reduce_planes` is exact on a device, and change its way of reading nibbles if it is not.

    To be asked before anything with `reduce_planes` in it is compiled for a GPU; asking compiles too. Every code
    occurs, in every nibble. All numbers are small integers: the right result is exact.
    """
    global keeps_subnormals
    codes_OI = (torch.arange(16 * 1024) % 17 % 16).to(torch.uint8).unflatten(0, (16, -1)).to(device)
    zeros_OG = torch.full((16, 128), 3, dtype=torch.uint8, device=device)
    grid_OG = pack_grid(torch.ones(16, 128, dtype=torch.float16, device=device), zeros_OG)
    words_OVG = sequential_words(codes_OI, 128).transpose(1, 2).contiguous()
    form = compiled(reduce_planes, block_sizes) if device.type == "cuda" else reduce_planes
    y_TO = form([words_OVG], grid_OG, torch.float16, *prescale(torch.ones(1, 1024, device=device), 128))
    if not torch.equal(y_TO, codes_OI.float().sub(3).sum(1, keepdim=True).t()):
        keeps_subnormals = False
        log.warning("%s flushes subnormal numbers: one-row products are slower there, and as exact", device)


def prescale(x_TI: Tensor, groups: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_planes` wants them: x_QNTVG float32, each times its nibble's power of two; sums_TVG.

    Powers of two are exact as long as |x| < 2^48. The sums are those of each part, in units of 2^(149 - PRESCALE).
    """
    x_TGQVN = x_TI.float().unflatten(-1, (groups, -1, parts, CODES_PER_WORD))
    scaled_N = [
        x_TGQV * 2.0 ** (PRESCALE - place)
        for (_, place), x_TGQV in zip(SUBNORMAL_PLACES, x_TGQVN.unbind(-1), strict=True)
    ]
    x_QNTVG = torch.stack(scaled_N).permute(3, 0, 1, 4, 2).contiguous()
    return x_QNTVG, x_TGQVN.sum((2, 4)).transpose(1, 2).contiguous() * 2.0 ** (PRESCALE - 149)


def reduce_planes(
    planes_OVG: Sequence[Tensor], grid_OG: Tensor, scale_dtype: torch.dtype, x_QNTVG: Tensor, sums_TVG: Tensor
) -> Tensor:
    """y [T, O] in float32 for a few rows: sum over groups of scale * (sum of code * x - zero * sum of x).

    Turning a nibble into a float costs one instruction. Masked out of the word and read as a float, a nibble n whose
    lowest bit is bit b has a zero exponent: it is the subnormal number n * 2^(b - 149), exactly. The activation it
    meets was multiplied by 2^(80 - b) beforehand (`prescale`), so every product is n * x * 2^(80 - 149), whichever b
    it came from, and one multiplication by 2^(149 - 80) at the end gives n * x:

        (word & (15 << b)) as float * (x * 2^(80 - b)) = n * x * 2^-69

    A fused multiply-add takes subnormal inputs at full speed and rounds its result, which is a normal number, once.
    So a weight costs two instructions, an AND and a multiply-add, and no weight is ever rounded. (`prove` finds out
    whether a device flushes subnormals to zero; `as_floats` then needs one instruction more.)

    A group is summed in V parts. More parts mean more and shorter threads, each with fewer activations to load for
    every output it computes. The planes are tensors of their own, because Inductor marks a buffer that it loads once
    `evict_first`, and one loaded several times `evict_last`.
    """
    rows_OVG: list[Any] = [0.0] * x_QNTVG.shape[2]
    for words_OVG, x_NTVG in zip(planes_OVG, x_QNTVG.unbind(), strict=True):
        for (shift, place), x_TVG in zip(SUBNORMAL_PLACES, x_NTVG.unbind(), strict=True):
            shifted_OVG = words_OVG >> shift if shift else words_OVG
            codes_OVG = as_floats(shifted_OVG & (15 << place))
            for row, (sum_OVG, x_VG) in enumerate(zip(rows_OVG, x_TVG.unbind(), strict=True)):
                rows_OVG[row] = sum_OVG + codes_OVG * x_VG
    scales_O1G, offsets_O1G = unpack_grid(grid_OG.unsqueeze(1), scale_dtype)
    zeros_O1G = -(2.0**7) - offsets_O1G
    power = 2.0 ** (149 - PRESCALE)
    if not keeps_subnormals:
        sums_TVG, power = sums_TVG * power, 1.0
    y_TO = [
        (scales_O1G * (sum_OVG - zeros_O1G * sums_VG)).sum((1, 2)) * power
        for sum_OVG, sums_VG in zip(rows_OVG, sums_TVG.unbind(), strict=True)
    ]
    return torch.stack(y_TO)


def as_floats(bits: Tensor) -> Tensor:
    """Nibbles n that begin at bit b of a word, as n * 2^(b - 149): the subnormals that they are.

    Or, where those are flushed, as n * 2^(b - 80): under the exponent of 2^23 the word is the float 2^23 + n * 2^b.
    """
    if keeps_subnormals:
        return bits.view(torch.float32)
    return (bits | (127 + 23) << 23).view(torch.float32) * 2.0**-PRESCALE - 2.0 ** (23 - PRESCALE)


def spread(x_TI: Tensor, groups: int) -> Tensor:
    """Activations as `dot_planes` wants them: x_NTJ, the inputs of each nibble, T padded with zeros to a whole tile.

    The inputs of a row lie together, as the tensor cores read them: so they are copied to shared memory while the
    tile before is multiplied, and never arranged anew.
    """
    rows = x_TI.shape[0]
    tile = next((tile for tile in DOT_TILES if rows <= tile), max(DOT_TILES))
    x_TGPN = torch.nn.functional.pad(x_TI, (0, 0, 0, -rows % tile)).unflatten(-1, (groups, -1, CODES_PER_WORD))
    return x_TGPN.permute(3, 0, 2, 1).flatten(2).contiguous()


def dot_planes(
    words_OPG: Tensor,
    grid_OG: Tensor,
    scale_dtype: torch.dtype,
    x_NTJ: Tensor,
    exponents_2O: Tensor,
    splits: int | None = None,
) -> Tensor:
    """y [O, T] for 4 to 64 rows: one tensor-core product for each of the eight nibbles of a word, in one kernel.

    A nibble n beginning at bit b of a float's mantissa, under the exponent of 2^(23 - b), is the number 2^(23 - b) + n.
    One multiply-add by the scale, with -(2^(23 - b) + zero) * scale to be added, leaves (n - zero) * scale, exactly.
    `splits` cuts the planes into parts summed by different programs, for matrices with few outputs (`splits_for`).
    """
    splits = splits or splits_for(words_OPG.shape[0], words_OPG.shape[1], x_NTJ.shape[1])
    exponents_12, exponents_16 = exponents_2O.unsqueeze(2).unsqueeze(2).unbind()
    words_KOPG = words_OPG.unflatten(1, (splits, -1)).transpose(0, 1)
    scales_O1G, offsets_O1G = unpack_grid(grid_OG.unsqueeze(1), scale_dtype)
    offsets_16 = offsets_O1G * scales_O1G
    offsets_12 = offsets_16 - scales_O1G * (2.0**11 - 2.0**7)
    y_KOT: Any = 0.0
    for (shift, place), x_TJ in zip(MAGIC_PLACES, x_NTJ.unbind(), strict=True):
        exponents, offsets = (exponents_12, offsets_12) if place == 12 else (exponents_16, offsets_16)
        shifted_KOPG = words_KOPG << shift if shift > 0 else words_KOPG >> -shift
        magic_KOPG = (shifted_KOPG & (15 << place)) | exponents
        weight_KOPG = magic_KOPG.view(torch.float32) * scales_O1G + offsets
        weight_KOJ = weight_KOPG.to(x_NTJ.dtype).flatten(2)
        if splits == 1:
            product_KOT = torch.mm(weight_KOJ.squeeze(0), x_TJ.t()).unsqueeze(0)
        else:
            product_KOT = torch.bmm(weight_KOJ, x_TJ.unflatten(1, (splits, -1)).permute(1, 2, 0))
        y_KOT = y_KOT + product_KOT
    return y_KOT.squeeze(0) if splits == 1 else in_float32(y_KOT).sum(0).to(x_NTJ.dtype)


def in_float32(sums: Tensor) -> Tensor:
    """Sums that Inductor writes, or keeps, in float32, as they are in registers: `as_strided` makes it stop there."""
    return sums.float().as_strided(sums.shape, sums.stride())


def parts_for(groups: int, planes: int, rows: int | None = None) -> int:
    """In how many parts `reduce_planes` sums a group: so many that a warp has 128 summands of an output."""
    wanted = PARTS.get((groups, rows or 0), max(4, SUMMANDS_OF_A_WARP // groups))
    parts = 1
    while parts < wanted and planes % (2 * parts) == 0:
        parts *= 2
    return parts


def splits_for(outputs: int, planes: int, columns: int) -> int:
    """In how many parts `dot_planes` sums: as few as give every multiprocessor about two programs of 64 outputs."""
    splits = 1
    while splits * outputs < 64 * (256 if columns == 8 else 192) and planes % (2 * splits) == 0:
        splits *= 2
    return splits


def block_sizes(kind: str, sizes: dict[str, int], sums: int = 1) -> dict[str, int] | None:
    """The tiles that were fastest on an H200 (`scripts/gpu_kernels.py`), or within 6 % of it.

    `reduce_planes`: a thread takes four neighbouring summands (one load) of a few outputs, for which it uses its
    activations, and a program all summands of those outputs. All words of a tile are loaded before the first is used,
    and 64 of them fit a thread's registers: four outputs, four planes. With 128 a kernel may be twenty times slower,
    because the assembler gives up and keeps 32 registers (`tests/test_kernel_counts.py`).
    `dot_planes`: 16 outputs a warp, and as many words as leave room in its registers.
    """
    if kind == "sum":
        is_short = sizes["r0_"] <= MOST_SUMMANDS_AT_ONCE and sizes["x"] <= MOST_SHORT_SUMS
        return sum_at_once(sizes["r0_"]) if is_short else None
    if kind == "planes":
        summands = min(1024, max(SUMMANDS_OF_A_WARP, 1 << (sizes["r0_"] - 1).bit_length()))
        default = 2 if sums > 2 or (sums == 1 and summands == SUMMANDS_OF_A_WARP) else 4
        outputs = OUTPUTS.get((sizes["x"], sizes["r0_"], sums), default)
        return {
            "XBLOCK": outputs,
            "R0_BLOCK": summands,
            "num_warps": summands // SUMMANDS_OF_A_WARP,
            "num_stages": 1,
        }
    columns = min(sizes["x"], max(DOT_TILES))
    outputs, words, stages = DOT_TILES[columns]
    tile = {"XBLOCK": columns, "YBLOCK": outputs, "R0_BLOCK": words, "num_warps": outputs // 16, "num_stages": stages}
    return tile | ({"ZBLOCK": 1} if "z" in sizes else {})


def sum_at_once(summands: int) -> dict[str, int]:
    """One program for each short sum, and one summand for each thread: what a group's activations go through.

    Such a kernel takes as long as its loads are on their way. Its fastest tile and one that leaves the GPU to a single
    program differ by 12 microseconds, which a search by timing has been seen not to find (docs/log.md).
    """
    block = 1 << (summands - 1).bit_length()
    return {"XBLOCK": 1, "R0_BLOCK": block, "num_warps": min(8, max(1, block // 32)), "num_stages": 1}


OPTIONS: dict[str, Any] = {
    "triton.native_matmul": True,
    # Below these thresholds Inductor would cut the long sums into several kernels.
    "realize_opcount_threshold": 100_000,
    "realize_reads_threshold": 1_000,
    "realize_acc_reads_threshold": 1_000,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def compiled(
    function: Callable[..., Any], choose: Callable[..., dict[str, int] | None], **options: Any
) -> Callable[..., Any]:
    """`function` compiled for the shapes it meets, with the block sizes that `choose` knows."""
    lowered = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS | options)
    # Importing Inductor takes seconds, which those who do not compile need not wait.
    inductor = import_module("miniawq.inductor")
    choices = inductor.BlockSizes(choose)

    def call(*arguments: Any) -> Any:
        with inductor.V.set_choices_handler(choices):
            return lowered(*arguments)

    return call
