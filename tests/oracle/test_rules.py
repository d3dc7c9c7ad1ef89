"""Rules that several checks share, each with a target just right and one just wrong."""

import pytest
import torch

from miniawq.oracle.adversarial import expect_half_scale
from miniawq.oracle.subject import Broken, Subject


class Zeros:
    """Every code and zero 0 under a scale of 1; pack empties what it was given."""

    def quantize(self, weight, group_size):
        outputs, inputs = weight.shape
        grid = torch.zeros(inputs // group_size, outputs)
        return torch.zeros(inputs, outputs, dtype=torch.uint8), grid.to(torch.uint8), (grid + 1).half()

    def pack(self, codes):
        codes.zero_()
        return torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int32)


def test_half_a_scale_is_allowed_and_a_hundredth_of_that_more_is_not():
    expect_half_scale(Subject(Zeros()), torch.full((8, 32), 0.5), 32)
    with pytest.raises(Broken):
        expect_half_scale(Subject(Zeros()), torch.full((8, 32), 0.505), 32)


def test_an_argument_that_is_written_into_is_seen():
    with pytest.raises(Broken, match="pack changed codes"):
        Subject(Zeros()).pure("pack", torch.ones(2, 8, dtype=torch.uint8))
