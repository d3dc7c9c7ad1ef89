"""The oracle: what would make it blind."""

from tests.planted.fault import Fault

FAULTS_FIND, COVERING, RULES = "oracle/test_faults", "oracle/test_covering", "oracle/test_rules"
FAULTS = [
    Fault("oracle/covering.py", r"range\(len\(factors\[other\]\)\)", "range(1)", COVERING),
    Fault("oracle/covering.py", r"if allowed\(setting \| \{name: level\}\)", "if True", COVERING),
    Fault("oracle/adversarial.py", r"\(0\.5 \+ ARITHMETIC\)", "(0.51 + ARITHMETIC)", RULES),
    Fault("oracle/adversarial.py", r"gap \* \(1 - 2\.0\*\*-12\)", "gap * 2", FAULTS_FIND),
    Fault("oracle/subject.py", r"old is not None and not same_bits\(old, memory\(new\)\)", "False", RULES),
    Fault("oracle/state.py", r"^CALLS = 420", "CALLS = 42", FAULTS_FIND),
    Fault(
        "oracle/ranges.py", r"may_be_nan = flat\.isinf\(\)\.any\(1, keepdim=True\)", "may_be_nan = True", FAULTS_FIND
    ),
    Fault("oracle/searches.py", r"^CLEAR = 0\.8", "CLEAR = 0.0", FAULTS_FIND),
    Fault("oracle/loader.py", r'^( +)linears\["lm_head"\] = .*$', r"\1pass", "quantize/test_head"),
    Fault("oracle/loader.py", r"if weight_map\.get\(name\) == file", "if True", "oracle/test_oracle"),
    Fault("oracle/edges.py", r"^ROWS = 4104", "ROWS = 104", FAULTS_FIND),
    Fault("oracle/report.py", r"return re\.sub\(.*text\)", "return text", "oracle/test_report"),
    Fault(
        "oracle/refused.py", r"getattr\(truth, function\)\(\*arguments\)", "raise ValueError", "oracle/test_diagnosis"
    ),
    Fault("oracle/probes.py", r"layer\.zeros\.clamp_\(1, 14\)", "layer.zeros.clamp_(8, 8)", "oracle/test_diagnosis"),
]
