"""The INT4 product of few rows on a CPU, as an expression that `torch.compile` turns into one loop of vectors.

Shapes: O outputs, I inputs, G groups, P words of a group (S / 8), N nibbles (8), T rows.
"""

import torch
from torch import Tensor

from miniawq.packing import CODES_PER_WORD


def prescale_words(x_TI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_words` wants them: x_TGNP float32, nibbles 0..6 divided by 16^nibble; means_TG.

    The activations of a group lie together. Nibble by nibble over all inputs, those of one word would often lie a power
    of two apart, in the same few sets of the first cache: that order was 4 times slower at 8 rows (docs/log.md).

    A mean is the sum of a group's activations, divided by its words: what one word's zeros take away.
    """
    x_TGPN = x_TI.float().unflatten(-1, (groups, -1, CODES_PER_WORD))
    scaled_N = [x_TGP * 16.0 ** -(nibble % 7) for nibble, x_TGP in enumerate(x_TGPN.unbind(-1))]
    return torch.stack(scaled_N, 2), x_TGPN.sum(-1).mean(-1)


def reduce_words(words_OGP: Tensor, scales_OG: Tensor, zeros_OG: Tensor, x_TGNP: Tensor, means_TG: Tensor) -> Tensor:
    """y [T, O] in float32: `forms.reduce_planes` with conversions, at which a CPU is good, instead of subnormals.

    The words come as float32 and are read as int32 here, because Inductor's vector load of integers goes through the
    stack (`Vectorized<int32_t>::loadu` of torch 2.13 on AVX2) and that of floats does not. A nibble is converted where
    it stands, as n * 16^i, which the activation's 16^-i undoes; only the highest, beside the sign, is moved down.
    Even and odd nibbles are summed apart: a multiply-add waits four cycles for the sum before it.
    """
    words_OGP = words_OGP.view(torch.int32)
    codes_NOGP = [(words_OGP & (15 << 4 * nibble)).float() for nibble in range(7)]
    codes_NOGP.append(((words_OGP >> 28) & 15).float())
    scales_OG1, zeros_OG = scales_OG.float().unsqueeze(-1), zeros_OG.float()
    y_TO = []
    for x_GNP, means_G in zip(x_TGNP.unbind(), means_TG.unbind(), strict=True):
        terms_NOGP = [codes_OGP * x_GP for codes_OGP, x_GP in zip(codes_NOGP, x_GNP.unbind(1), strict=True)]
        sum_OGP = sum(terms_NOGP[2::2], terms_NOGP[0]) + sum(terms_NOGP[3::2], terms_NOGP[1])
        y_TO.append((scales_OG1 * (sum_OGP - (zeros_OG * means_G).unsqueeze(-1))).sum((1, 2)))
    return torch.stack(y_TO)
