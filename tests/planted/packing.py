"""The INT4 number and the words."""

from tests.planted.fault import Fault

TEST = "test_packing"
FAULTS = [
    Fault("packing.py", r"^(AWQ_ORDER = )\([0-9, ]*\)", r"\1(0, 4, 1, 5, 2, 6, 3, 7)", TEST),
    Fault("packing.py", r"(bytes_RW4\[\.\.\., byte\]) & TOP_CODE", r"\1", TEST),
    Fault("packing.py", r"codes_RC\.amax\(\) > TOP_CODE or", "False or", TEST),
    Fault("packing.py", r"codes_RC\.is_floating_point\(\)", "False", TEST),
    Fault("packing.py", r" \+ \(nearest\.double\(\) < values\)", "", TEST),
    Fault("packing.py", r"\(nearest\.double\(\) < values\)", "1", TEST),
    Fault("packing.py", r"bits\.clamp\(min=1\)", "bits", TEST),
    Fault("packing.py", r"(lowest_OG = \w+\.amin\(-1\))\.clamp\(max=0\)", r"\1", TEST),
    Fault("packing.py", r"(highest_OG = \w+\.amax\(-1\))\.clamp\(min=0\)", r"\1", TEST),
    Fault("packing.py", r"(-lowest_OG / scales_OG\.double\(\)\))\.round\(\)", r"\1.floor()", TEST),
    Fault("packing.py", r"steps_OGS\.round\(\) \+", "steps_OGS.floor() +", TEST),
    Fault("packing.py", r"\.clamp\(0, TOP_CODE\)(?=\n +codes_OI)", ".clamp(0, TOP_CODE - 1)", TEST),
    Fault("packing.py", r"groups_OGS\.double\(\) / (scales_OG\[rows\])\.double\(\)", r"groups_OGS.half() / \1", TEST),
    Fault("packing.py", r"(zeros_OG\[rows\]\.unsqueeze\(-1\))(\) \* scales)", r"\1 - 1\2", TEST),
    Fault("packing.py", r"(\* scales_OG\[)rows(\]\.float\(\))", r"\1:1\2", TEST),
    Fault("packing.py", r"(group_size < 1) or inputs % group_size", r"\1", TEST),
    Fault("packing.py", r"not weight_OI\.sum\(dtype=torch\.float64\)\.isfinite\(\) and", "False and", TEST),
    Fault("packing.py", r"not scales_OG\.isfinite\(\)\.all\(\)", "False", TEST),
]
