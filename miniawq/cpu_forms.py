"""The INT4 product of few rows on a CPU, as an expression that `torch.compile` turns into one loop of vectors.

Shapes: O outputs, in K blocks of W (8 or 16); I inputs, G groups, P words of a group (S / 8), N nibbles (8); T rows, in
C tiles of R.
"""

from functools import reduce
from math import gcd
from operator import add

import torch
from torch import Tensor

from miniawq.packing import CODES_PER_WORD

MOST_ROWS_OF_A_TILE = 4
BLOCKS_AT_ONCE = 4


def prescale_words(x_TI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_words` wants them: x_CGPRN float32, nibbles divided by 256^(nibble // 2); means_CGR.

    What one step of the loop reads lies together. As few tiles as there can be, filled up with zeros. A mean is the sum
    of a group's activations, divided by its words: what one word's zeros take away.
    """
    tiles = -(-len(x_TI) // MOST_ROWS_OF_A_TILE)
    tile = -(-len(x_TI) // tiles)
    x_TI = torch.nn.functional.pad(x_TI.float(), (0, 0, 0, tiles * tile - len(x_TI)))
    x_CRGPN = x_TI.unflatten(0, (tiles, tile)).unflatten(-1, (groups, -1, CODES_PER_WORD))
    powers_N = torch.tensor([256.0 ** -(nibble // 2) for nibble in range(CODES_PER_WORD)], device=x_TI.device)
    means_CGR = (x_CRGPN.sum(-1) / x_CRGPN.shape[3]).sum(-1).transpose(1, 2).contiguous()
    return (x_CRGPN * powers_N).permute(0, 2, 3, 1, 4).contiguous(), means_CGR


def reduce_words(words_KGPW: Tensor, grid_KG2W: Tensor, x_CGPRN: Tensor, means_CGR: Tensor) -> Tensor:
    """y [(C, R), O] in float32: `forms.reduce_planes` with conversions, at which a CPU is good, instead of subnormals.

    One loop sums the quarters of all blocks side by side: four sums that do not wait for one another, for activations
    that are loaded once, and memory is read at four places at a time.
    """
    quarters = gcd(len(words_KGPW), BLOCKS_AT_ONCE)
    of_quarters = [
        sums_of_blocks(words, grid, x_CGPRN, means_CGR)
        for words, grid in zip(words_KGPW.chunk(quarters), grid_KG2W.chunk(quarters), strict=True)
    ]
    y_RKCW = torch.cat([y_KCW for of_row in zip(*of_quarters, strict=True) for y_KCW in of_row])
    return y_RKCW.unflatten(0, (-1, len(words_KGPW))).permute(2, 0, 1, 3).flatten(2).flatten(0, 1)


def sums_of_blocks(words_KGPW: Tensor, grid_KG2W: Tensor, x_CGPRN: Tensor, means_CGR: Tensor) -> list[Tensor]:
    """y_KCW of some blocks, for each row of the tiles.

    A vector holds the same word of W outputs. It meets one activation after the other, each loaded into all lanes, and
    every lane sums its own output: an activation in the cache serves W outputs, and no sum crosses a vector.

    The words come as float32 and are read as int32 here, because Inductor's vector load of integers goes through the
    stack (`Vectorized<int32_t>::loadu` of torch 2.13 on AVX2) and that of floats does not. A nibble is converted where
    it stands, as n * 256^i, which the activation's 256^-i undoes. One shift brings the odd nibbles to where the even
    ones stand, so the highest is never read beside the sign, and four masks do for eight. Even and odd nibbles are
    summed apart: a multiply-add waits four cycles for the sum before it. The first of them takes the zeros away.
    """
    words_K1GPW = words_KGPW.view(torch.int32).unsqueeze(1)
    codes_NK1GPW = [
        ((words_K1GPW >> 4 if nibble % 2 else words_K1GPW) & (15 << 8 * (nibble // 2))).float()
        for nibble in range(CODES_PER_WORD)
    ]
    scales_K1G1W, zeros_K1G1W = grid_KG2W.unsqueeze(1).unsqueeze(4).unbind(3)
    y_RKCW = []
    for x_CGPN, means_CG in zip(x_CGPRN.unbind(3), means_CGR.unbind(2), strict=True):
        x_NCGP1 = x_CGPN.unsqueeze(-1).unbind(-2)
        terms_NKCGPW = [codes_K1GPW * x_CGP1 for codes_K1GPW, x_CGP1 in zip(codes_NK1GPW, x_NCGP1, strict=True)]
        terms_NKCGPW[0] = terms_NKCGPW[0] - zeros_K1G1W * means_CG[..., None, None]
        sum_KCGPW = reduce(add, terms_NKCGPW[::2]) + reduce(add, terms_NKCGPW[1::2])
        y_RKCW.append((scales_K1G1W * sum_KCGPW).sum((2, 3)))
    return y_RKCW
