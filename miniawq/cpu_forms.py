"""The INT4 product of few rows on a CPU, as an expression that `torch.compile` turns into one loop of vectors.

Shapes: O outputs, in K blocks of W words of N nibbles (8); I inputs, in G groups of S; T rows, in C tiles of R rows;
H passes over a group's words, in each of which M of their nibbles are multiplied.
"""

import torch
from torch import Tensor

from miniawq.packing import CODES_PER_WORD

# Nibbles of a pass for the rows of a tile. Each nibble of each row has a sum, and eight sums leave half of AVX2's 16
# registers to the codes and activations that they are made of.
NIBBLES_OF_A_PASS = {1: 8, 2: 4, 3: 2, 4: 2}


def tiles(x_TI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_words` wants them: x_CGSR float32, the rows of an input together; sums_CGR.

    As few tiles as there can be, filled up with zeros, and no larger than they must be for that.
    """
    rows = len(x_TI)
    largest = max(NIBBLES_OF_A_PASS)
    count = -(-rows // largest)
    tile = -(-rows // count)
    x_TI = torch.nn.functional.pad(x_TI.float(), (0, 0, 0, count * tile - rows))
    x_CGSR = x_TI.unflatten(0, (count, tile)).unflatten(-1, (groups, -1)).permute(0, 2, 3, 1).contiguous()
    return x_CGSR, x_CGSR.sum(2)


def reduce_words(words_KGSW: Tensor, grid_KG2NW: Tensor, x_CGSR: Tensor, sums_CGR: Tensor) -> Tensor:
    """y [(C, R), O] in float32: sum over groups of scale * (sum of code * x - zero * sum of x).

    A word holds one input's codes of eight outputs. So an activation, loaded once, meets a whole vector of words and M
    vectors of codes, and nothing is ever summed across a vector. A nibble is converted where it stands, at bit b:

        float(word & (15 << b)) = code * 2^b,    hence    sum of code * x = 2^-b * sum of float(word & (15 << b)) * x

    and 2^-b costs one multiplication a group, exact. A shift by four brings odd nibbles to where even ones stand, so the
    highest is never read beside the sign.

    The words come as float32 and are read as int32 here, because Inductor's vector load of integers goes through the
    stack (`Vectorized<int32_t>::loadu` of torch 2.13 on AVX2) and that of floats does not.
    """
    tile = x_CGSR.shape[-1]
    nibbles = NIBBLES_OF_A_PASS[tile]
    passes = CODES_PER_WORD // nibbles
    first_H11 = torch.arange(0, 32, 32 // passes, dtype=torch.int32, device=x_CGSR.device).view(-1, 1, 1)
    words_K1G1SW = words_KGSW.view(torch.int32)[:, None, :, None]
    x_CG1S1R = x_CGSR[:, :, None, :, None]
    sums_CG11R = sums_CGR[:, :, None, None]
    scales_KGHMW, zeros_KGHMW = grid_KG2NW.unflatten(3, (passes, nibbles)).unbind(2)
    y_KCHW = []
    for nibble in range(nibbles):
        place = 8 * (nibble // 2)
        moved_K1GHSW = words_K1G1SW >> (first_H11 + 4 * (nibble % 2))
        codes_K1GHSW = (moved_K1GHSW & (15 << place)).float()
        scales_K1GHW, zeros_K1GHW = scales_KGHMW[:, None, :, :, nibble], zeros_KGHMW[:, None, :, :, nibble]
        for row in range(tile):
            sum_KCGHW = in_pairs(codes_K1GHSW * x_CG1S1R[..., row], tile).sum(-2)
            terms = scales_K1GHW * (sum_KCGHW * 2.0**-place - zeros_K1GHW * sums_CG11R[..., row])
            y_KCHW.append(terms.sum(2))
    y_KCHMRW = torch.stack(y_KCHW, -2).unflatten(-2, (nibbles, tile))
    return y_KCHMRW.permute(1, 4, 0, 5, 2, 3).reshape(len(x_CGSR) * tile, -1)


def in_pairs(products: Tensor, tile: int) -> Tensor:
    """Neighbouring inputs' products added, [..., S, W] to [..., S / 2, W], for a tile of one row.

    There the compiler has one register too few, and keeps a sum in memory: then two inputs wait for it at once.
    """
    return products.unflatten(-2, (-1, 2)).sum(-2) if tile == 1 else products
