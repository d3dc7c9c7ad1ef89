"""The definition of the product, and the layer."""

from tests.planted.fault import Fault

TEST = "test_kernel"
FAULTS = [
    Fault(
        "kernel.py",
        r"split\(\[layer\.out_features for layer in layers\]",
        r"split([layer.out_features for layer in layers[::-1]]",
        TEST,
    ),
    Fault("kernel.py", r"if was_prepacked else", "if False else", TEST),
    Fault("kernel.py", r"^(    def _refuse_prepacked.*\n        if )self\.prepacked is not None", r"\1False", TEST),
    Fault("kernel.py", r"bias_O\[some_O\]\.to\(x\.dtype\), x_TI", "bias_O[:1].to(x.dtype), x_TI", TEST),
    Fault("kernel.py", r"not x\.is_floating_point\(\)", "False", TEST),
    Fault("kernel.py", r"bias_O\.shape != scales_GO\.shape\[1:\]", "False", TEST),
    Fault("kernel.py", r"else y \+ bias_O\.double\(\)", "else y", TEST),
]
