"""Which searches a run uses. `default` is ours, `neighbours` learns the codes as well, `paper` is chapter 2 as it
stands, and `plain` searches nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from miniawq import awq
from miniawq.awq import Method, Rounding
from miniawq.quantize.factors import DECISIVE, Formula, coarse_to_fine
from miniawq.quantize.grids import GRIDS
from miniawq.quantize.neighbours import neighbouring_codes
from miniawq.quantize.ranges import independent_sides, plain_ranges


@dataclass(frozen=True)
class Recipe:
    """How weights are rounded, and what is searched: plain data, which journals and reports hold.

    formulas: how candidates follow from the statistics (`factors.py`); without any there is no scaling.
    ratios, stride: exponents are multiples of 1 / ratios; every stride-th is tried, then those around the best.
    clip: which ranges are searched: "limits" is the paper's clipping, "ranges" is ours (`ranges.py`).
    unclipped: what "limits" leaves as it is, told for the report; the layers are named in `awq.UNCLIPPED`.
    codes: "nearest" to the weights, or "neighbours" that know each other (`neighbours.py`), with decisive factors only.
    """

    group_size: int = 128
    grid: str = "asymmetric"
    scale_dtype: torch.dtype = torch.float16
    formulas: tuple[Formula, ...] = ("activations", "duo")
    ratios: int = 20
    stride: int = 4
    clip: Literal["none", "limits", "ranges"] = "ranges"
    unclipped: tuple[str, ...] = ()
    codes: Literal["nearest", "neighbours"] = "nearest"

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.group_size, GRIDS[self.grid], self.scale_dtype)

    @property
    def method(self) -> Method:
        """The searches: here, and nowhere else, ours take the place of the paper's."""
        ranges = {"none": plain_ranges, "limits": awq.search_ranges, "ranges": independent_sides}[self.clip]
        if self.learns:
            factors = coarse_to_fine(self.formulas, self.ratios, self.stride, DECISIVE)
            return Method(factors, ranges, neighbouring_codes)
        is_papers = self.formulas == ("activations",) and (self.ratios, self.stride) == (20, 1)
        factors = awq.search_factors if is_papers else coarse_to_fine(self.formulas, self.ratios, self.stride)
        return Method(factors, ranges)

    @property
    def learns(self) -> bool:
        """Whether codes are learned, for which a run looks at the text again before it rounds."""
        return self.codes == "neighbours"

    @property
    def reach(self) -> float:
        """How far a weight may be from its code, in scales: codes beside it, or nearest ones."""
        return 1.0 if self.learns else 0.5

    def described(self) -> dict[str, Any]:
        return asdict(self) | {"scale_dtype": str(self.scale_dtype).removeprefix("torch.")}


DEFAULT = Recipe()
NEIGHBOURS = Recipe(codes="neighbours")
PAPER = Recipe(formulas=("activations",), stride=1, clip="limits", unclipped=awq.UNCLIPPED)
PLAIN_ROUNDING = Recipe(formulas=(), clip="none")
RECIPES = {"default": DEFAULT, "neighbours": NEIGHBOURS, "paper": PAPER, "plain": PLAIN_ROUNDING}
