"""The method as the paper has it."""

from tests.planted.fault import Fault

TEST, SEARCHES = "test_awq", "quantize/test_searches"
FAULTS = [
    Fault("awq.py", r"with ExitStack\(\) as hooks:", "for hooks in [ExitStack()]:", TEST),
    Fault("awq.py", r"self\.moments_II\.diagonal\(\)\.isfinite\(\)\.all\(\)", "True", SEARCHES),
    Fault("awq.py", r"\.clamp_\((-zeros\w*), TOP_CODE - zeros\w*\)", r".clamp_(\1, TOP_CODE)", TEST),
    Fault("awq.py", r"\.mul_\(factors_I\.reciprocal\(\)\)", ".mul_(factors_I)", TEST),
    Fault("awq.py", r"(\(error_OI @ self\.moments_II\))\.mul_\(error_OI\)", r"\1.square()", TEST),
    Fault("awq.py", r"(self\.moments_II /= factors_I)\[:, None\]", r"\1", SEARCHES),
    Fault("awq.py", r"clamp\(-bound_\w+, (bound_\w+)\)", r"clamp(max=\1)", TEST),
    Fault("awq.py", r"clamp\((-bound_\w+), bound_\w+\)", r"clamp(min=\1)", TEST),
    Fault("awq.py", r"^(RATIOS = .*) / 20", r"\1 / 40", SEARCHES),
    Fault("awq.py", r"not \(after - before\)\.abs\(\)\.max\(\) <= .*:$", "False:", TEST),
    Fault("awq.py", r"\(\(weight \+ offset\) / gain_P\)\.where\(", "factors_P.where(", TEST),
    Fault("awq.py", r"smooth\.bias\.data / divisors_O", "smooth.bias.data", TEST),
    Fault("awq.py", r"\(outputs - len\(factors_P\), 0\)", "(0, outputs - len(factors_P))", TEST),
    Fault("awq.py", r"seen\.usable and fold\.smooth_layer", "seen.usable", TEST),
    # Whoever compares what a search thought, and not the codes that are stored, may keep a row that loses more.
    Fault("awq.py", r"losses\(found\) > plain_O", "losses(found) > 1e9 + plain_O", TEST),
    Fault("awq.py", r"safe\.where\(worse_O1, new\)", "safe.where(worse_O1.all(), new)", TEST),
]
