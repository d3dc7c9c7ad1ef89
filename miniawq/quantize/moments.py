"""`awq.Statistics` at half the cost: C = mean(x x^T) is symmetric, so only the blocks of its lower triangle are
multiplied.
"""

from collections.abc import Iterator

from torch import Tensor

from miniawq.awq import Statistics

BLOCK_ROWS = 2048  # rows of C in a block: large enough for a GPU to multiply at its full rate


class SymmetricStatistics(Statistics):
    """The same numbers, up to the order of float32 sums in layers of more than 2,048 inputs."""

    def add(self, x_TI: Tensor) -> None:
        """Add some tokens to the sums. The upper triangle of C stays empty until `finish`."""
        self.tokens += len(x_TI)
        self.magnitude_I += x_TI.abs().sum(0)
        # Contiguous along the tokens, which the product sums over: only so does a GPU reach its full TF32 rate.
        x_IT = x_TI.t().contiguous()
        for rows in self._blocks():
            self.moments_II[rows, : rows.stop].addmm_(x_IT[rows], x_IT[: rows.stop].t())

    def finish(self) -> None:
        """Turn sums into means, and mirror the lower triangle."""
        super().finish()
        for rows in self._blocks():
            self.moments_II[: rows.start, rows] = self.moments_II[rows, : rows.start].t()

    def losses(self, error_OI: Tensor) -> Tensor:
        """The diagonal of E C E^T, [O]: a block off C's diagonal is multiplied once and counted twice."""
        losses_O = error_OI.new_zeros(len(error_OI))
        for rows in self._blocks():
            own, before = error_OI[:, rows], slice(0, rows.start)
            product = own @ self.moments_II[rows, rows]
            product.addmm_(error_OI[:, before], self.moments_II[before, rows], alpha=2)
            losses_O += product.mul_(own).sum(1)
        return losses_O

    def _blocks(self) -> Iterator[slice]:
        inputs = len(self.moments_II)
        return (slice(start, min(start + BLOCK_ROWS, inputs)) for start in range(0, inputs, BLOCK_ROWS))
