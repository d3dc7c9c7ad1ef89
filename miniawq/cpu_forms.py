"""Products of few rows on a CPU, as expressions that `torch.compile` turns into one loop of vectors.

Shapes: O outputs, in K blocks of W (8 or 16), V parts of as many blocks each; I inputs, G groups, P words of a group
(S / 8), N nibbles (8); T rows, in C tiles of R.
"""

from math import gcd

import torch
from torch import Tensor

from miniawq.operations import sums_in_step
from miniawq.packing import CODES_PER_WORD

# For the rows of a tile, the parts of a weight that were fastest side by side (docs/log.md).
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
    weights_VO1I = weight_OI.unsqueeze(1).unflatten(0, (parts, -1))
    y_OC = [(weight_O1I.float() * x_CI).sum(-1) for weight_O1I in weights_VO1I for x_CI in x_CRI.unbind(1)]
    return torch.stack(y_OC).unflatten(0, (parts, rows)).permute(3, 1, 0, 2).flatten(2).flatten(0, 1)


def prescale_words(x_TI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_words` wants them: x_CGPRN float32, nibbles divided by 256^(nibble // 2); means_CGR.

    What one step of the loop reads lies together. A mean is the sum of a group's activations, divided by its words:
    what one word's zeros take away.
    """
    x_CRGPN = in_tiles(x_TI).unflatten(-1, (groups, -1, CODES_PER_WORD))
    powers_N = torch.tensor([256.0 ** -(nibble // 2) for nibble in range(CODES_PER_WORD)], device=x_TI.device)
    means_CGR = (x_CRGPN.sum(-1) / x_CRGPN.shape[3]).sum(-1).transpose(1, 2).contiguous()
    return (x_CRGPN * powers_N).permute(0, 2, 3, 1, 4).contiguous(), means_CGR


def as_loaded(words_KGPW: Tensor) -> Tensor:
    """The words in the dtype in which Inductor loads vectors of them without a detour over the stack.

    With AVX2 integers take it (`Vectorized<int32_t>::loadu` of torch 2.13) and floats do not. With AVX-512 integers are
    loaded at once, and floats read as integers would take it, number by number.
    """
    return words_KGPW.view(torch.float32) if words_KGPW.shape[3] == LANES_OF_AVX2 else words_KGPW


def reduce_words(words_KGPW: Tensor, grid_KG2W: Tensor, x_CGPRN: Tensor, means_CGR: Tensor) -> Tensor:
    """y [(C, R), O] in float32: `forms.reduce_planes` with conversions, at which a CPU is good, instead of subnormals.

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
    words_VK1GPW = words_KGPW.view(torch.int32).unsqueeze(1).unflatten(0, (parts, -1))
    scales_VK1G1W, zeros_VK1G1W = grid_KG2W.unsqueeze(1).unsqueeze(4).unflatten(0, (parts, -1)).unbind(4)
    means_RCG11 = means_CGR[..., None, None].movedim(2, 0)
    terms = [zeros_K1G1W * -means_CG11 for zeros_K1G1W in zeros_VK1G1W for means_CG11 in means_RCG11]
    for nibble in EVEN_THEN_ODD:
        x_RCGP1 = x_CGPRN[..., nibble, None].movedim(3, 0)
        for words_K1GPW in words_VK1GPW:
            shifted_K1GPW = words_K1GPW >> 4 if nibble % 2 else words_K1GPW
            codes_K1GPW = (shifted_K1GPW & (15 << 8 * (nibble // 2))).float()
            terms += [codes_K1GPW * x_CGP1 for x_CGP1 in x_RCGP1]
    sums_KCGPW = sums_in_step(torch.broadcast_tensors(*terms), parts * rows)
    scales_K1G1W = [scales_K1G1W for scales_K1G1W in scales_VK1G1W for _ in range(rows)]
    y_KCW = [(scale * total).sum((2, 3)) for scale, total in zip(scales_K1G1W, sums_KCGPW, strict=True)]
    return torch.stack(y_KCW).unflatten(0, (parts, rows)).permute(3, 1, 0, 2, 4).flatten(2).flatten(0, 1)
