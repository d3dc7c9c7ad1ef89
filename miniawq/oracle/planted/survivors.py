"""Faults that no check finds, each with the reason why it is none."""

ALONE = "the row above the only row is that row"
NOWHERE = "there is no such place under that circumstance"
EXACT = "a product below 2**-14 has a subnormal scale, and is a multiple of 2**-24: nothing is cut off"
RECIPROCAL = "a float32 quotient may cost 32 * 2**-24 scales (`adversarial`)"

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
    "quantize, the last of an odd number of outputs left zero": "outputs are a multiple of 8 (`Limits.multiple_of_n`)",
    "quantize, a parameter refused": "no argument requires a gradient, and a refusal is loud",
    "quantize, multiplied by the float32 reciprocal": RECIPROCAL,
    "quantize, weights are multiplied by a float32 reciprocal of the scale": RECIPROCAL,
    "load_checkpoint, the head may be missing where the config does not say whether it is tied": "nothing says that it "
    "is not, and a head that is nowhere can only be the embedding: miniawq reads it so (docs/checkpoints.md)",
    "matmul, zeros times the sum of x: infinity gives NaN": "the contract allows it: no output of such a row is finite",
    "load_checkpoint, zero_point not looked at": "the second definition does not look at it either: zeros are stored",
    "load_checkpoint, quant_config.json is believed before config.json": "two configs that disagree may be refused",
    "search_scales, square weights transposed": "the candidates come from x: the best of them is nearly the same",
}
