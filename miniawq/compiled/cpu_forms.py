"""Products of few rows on a CPU, as expressions that Inductor makes one loop of vectors of each.

Outputs are in K blocks of W (8 or 16), and V parts of as many blocks each; rows are in C tiles of R.
"""

from math import gcd

import torch
from torch import Tensor

from miniawq.compiled.operations import sums_in_step
from miniawq.packing import CODES_PER_WORD

# For each number of rows of a tile, the parts of a weight that were fastest side by side (docs/log).
PARTS_FOR_ROWS = {1: 4, 2: 4, 3: 2, 4: 2}
EVEN_THEN_ODD = (0, 2, 4, 6, 1, 3, 5, 7)
LANES_OF_AVX2 = 8


def in_tiles(x_TI: Tensor) -> Tensor:
    """x_CRI in float32: rows in as few tiles as there can be, filled up with zeros."""
    tiles = -(-len(x_TI) // max(PARTS_FOR_ROWS))
    tile = -(-len(x_TI) // tiles)
    return torch.nn.functional.pad(x_TI.float(), (0, 0, 0, tiles * tile - len(x_TI))).unflatten(0, (tiles, tile))


def reduce_dense(weight_OI: Tensor, x_CRI: Tensor) -> Tensor:
    """y [(C, R), O] in float32, of a weight of any dtype.

    A vector holds neighbouring inputs of an output. One loop goes through all inputs of an output in each part of the
    weight, and each meets all rows of a tile: the weight is read once from memory, at several places at a time, and
    several sums do not wait for one another.
    """
    rows = x_CRI.shape[1]
    parts = gcd(len(weight_OI), PARTS_FOR_ROWS[rows])
    weights_VU1I = weight_OI.unsqueeze(1).unflatten(0, (parts, -1))
    y_UC = [(weight_U1I.float() * x_CI).sum(-1) for weight_U1I in weights_VU1I for x_CI in x_CRI.unbind(1)]
    return torch.stack(y_UC).unflatten(0, (parts, rows)).permute(3, 1, 0, 2).flatten(2).flatten(0, 1)


def prescale_words(x_TI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_words` wants them: x_CGPRN float32, nibbles divided by 256^(nibble // 2); shares_CGPR.

    What one step of the loop reads lies together. A share is the sum of activations that one word's zeros take away:
    the mean of all words of a group, one number for all, or where that would be rounded (words are no power of two)
    the word's own.
    """
    x_CRGPN = in_tiles(x_TI).unflatten(-1, (groups, -1, CODES_PER_WORD))
    powers_N = torch.tensor([256.0 ** -(nibble // 2) for nibble in range(CODES_PER_WORD)], device=x_TI.device)
    shares_CRGP, words = x_CRGPN.sum(-1), x_CRGPN.shape[3]
    if words.bit_count() == 1:
        shares_CRGP = (shares_CRGP / words).sum(-1, keepdim=True)
    return (x_CRGPN * powers_N).permute(0, 2, 3, 1, 4).contiguous(), shares_CRGP.permute(0, 2, 3, 1).contiguous()


def as_loaded(words_KGPW: Tensor) -> Tensor:
    """The words in the dtype in which Inductor loads vectors of them without a detour over the stack.

    With AVX2 integers take it (`Vectorized<int32_t>::loadu` of torch 2.13) and floats do not. With AVX-512 integers are
    loaded at once, and floats read as integers would take it, number by number.
    """
    return words_KGPW.view(torch.float32) if words_KGPW.shape[3] == LANES_OF_AVX2 else words_KGPW


def reduce_words(words_KGPW: Tensor, grid_KG2W: Tensor, x_CGPRN: Tensor, shares_CGPR: Tensor) -> Tensor:
    """y [(C, R), O] in float32: like `gpu_forms.reduce_vectors`, with conversions, which a CPU does fast, instead of
    subnormals.

    A vector holds the same word of W outputs. It meets one activation after the other, each loaded into all lanes, and
    every lane sums its own output: an activation in the cache serves W outputs, and no sum crosses a vector.

    One loop goes through a few parts of all blocks side by side, and every nibble meets all rows: so there are always
    several sums that do not wait for one another, an activation is loaded once for all parts, and memory is read at
    several places at a time.

    The words come `as_loaded`. A nibble is converted where it stands, as n * 256^i, which the activation's 256^-i
    undoes. One shift brings the odd nibbles to where the even ones stand, so the highest is never read beside the sign,
    and four masks do for eight.
    """
    rows = x_CGPRN.shape[3]
    parts = gcd(len(words_KGPW), PARTS_FOR_ROWS[rows])
    words_VY1GPW = words_KGPW.view(torch.int32).unsqueeze(1).unflatten(0, (parts, -1))
    scales_VY1G1W, zeros_VY1G1W = grid_KG2W.unsqueeze(1).unsqueeze(4).unflatten(0, (parts, -1)).unbind(4)
    shares_RCGP1 = shares_CGPR[..., None].movedim(3, 0)
    terms = [zeros_Y1G1W * -shares_CGP1 for zeros_Y1G1W in zeros_VY1G1W for shares_CGP1 in shares_RCGP1]
    for nibble in EVEN_THEN_ODD:
        x_RCGP1 = x_CGPRN[..., nibble, None].movedim(3, 0)
        for words_Y1GPW in words_VY1GPW:
            shifted_Y1GPW = words_Y1GPW >> 4 if nibble % 2 else words_Y1GPW
            codes_Y1GPW = (shifted_Y1GPW & (15 << 8 * (nibble // 2))).float()
            terms += [codes_Y1GPW * x_CGP1 for x_CGP1 in x_RCGP1]
    sums_YCGPW = sums_in_step(torch.broadcast_tensors(*terms), parts * rows)
    scales_Y1G1W = [scales_Y1G1W for scales_Y1G1W in scales_VY1G1W for _ in range(rows)]
    y_YCW = [(scale * total).sum((2, 3)) for scale, total in zip(scales_Y1G1W, sums_YCGPW, strict=True)]
    return torch.stack(y_YCW).unflatten(0, (parts, rows)).permute(3, 1, 0, 2, 4).flatten(2).flatten(0, 1)
