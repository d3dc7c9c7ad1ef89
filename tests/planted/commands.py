"""The verbs beside generate and quantize."""

from tests.planted.fault import Fault

CONVERT, PLAN, EVALUATE = (f"commands/test_{name}" for name in ("convert", "plan", "evaluate"))
FAULTS = [
    Fault("commands/convert.py", r"symmetric = all\(", "symmetric = any(", CONVERT),
    Fault("commands/convert.py", r'for leaf in \("weight", "bias"\):', 'for leaf in ("weight",):', CONVERT),
    Fault("commands/convert.py", r'if key != "compression_config"\}', "if key not in CONFIG_KEYS}", CONVERT),
    Fault("commands/convert.py", r"if len\(sizes\) == 1:", "if sizes:", CONVERT),
    Fault("commands/convert.py", r"BYTES_A_WEIGHT \* largest", "largest", CONVERT),
    Fault("commands/plan.py", r"min\(degree, kv_heads\) if part in .* else degree", "degree", PLAN),
    Fault("commands/plan.py", r"1 if whole_rows else linear\.group_size", "1", PLAN),
    Fault("commands/plan.py", r"if heads % degree or", "if", PLAN),
    Fault(
        "commands/plan.py", r'if name == "lm_head\.weight" and model_config\.tie_word_embeddings:', "if False:", PLAN
    ),
    Fault("cli.py", r"^( +)_require_memory\(\)\n( +code)", r"\2", "commands/test_verbs"),
    Fault("cli.py", r"^    _open_streams\(\)\n", "", "commands/test_verbs"),
    Fault("commands/evaluate.py", r"if ours != theirs:", "if False:", EVALUATE),
    Fault("commands/evaluate.py", r"value is not None and value < least", "False", EVALUATE),
]
