"""Faults that no check finds, each with the reason why it is none."""

ALONE = "the row above the only row is that row"
NOWHERE = "there is no such place under that circumstance"
EXACT = "a product below 2**-14 has a subnormal scale, and is a multiple of 2**-24: nothing is cut off"

ARGUED: dict[str, str] = {
    **{
        f"{function}, {kind}, rows past 64, one row": NOWHERE
        for function in ("pack", "unpack", "matmul")
        for kind in ("zero", "off by one unit", "its left neighbour", "the row above")
    },
    **{
        f"{function}, the row above, {place}, one row": ALONE
        for function in ("pack", "unpack", "matmul")
        for place in ("everywhere", "first column", "last column", "last row", "middle element", "columns past 256")
    },
    **{
        f"matmul, {kind}, rows past 64, {when}": NOWHERE
        for when in ("a vector", "a bias and one row")
        for kind in ("zero", "off by one unit", "its left neighbour", "the row above")
    },
    **{
        f"{function}, {kind}, columns past 256, 8 outputs": NOWHERE
        for function in ("dequantize", "matmul")
        for kind in ("zero", "off by one unit", "its left neighbour", "the row above")
    },
    "dequantize, subnormal results cut off": EXACT,
    "pack, no rows is an error": "the contract speaks of no rows for the product alone",
    "search_scales, square weights transposed": "the candidates come from x: the best of them is nearly the same",
}
