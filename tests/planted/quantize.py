"""A checkpoint streamed through the method: our searches, grids, resume, memory, verification."""

from tests.planted.fault import Fault

SEARCHES, COSTS, JOB = (f"quantize/test_{name}" for name in ("searches", "costs", "job"))
PUBLISHING = "quantize/test_publishing"
FAULTS = [
    Fault(
        "quantize/grids.py",
        r"below_OG / \(SYMMETRIC_ZERO \+ 0\.5\)",
        "below_OG / (SYMMETRIC_ZERO + 0.6)",
        "test_packing",
    ),
    Fault(
        "quantize/grids.py",
        r"above_OG / \(TOP_CODE - SYMMETRIC_ZERO \+ 0\.5\)",
        "above_OG / SYMMETRIC_ZERO",
        "test_packing",
    ),
    Fault("quantize/moments.py", r", alpha=2\)", ", alpha=1)", SEARCHES),
    Fault("quantize/moments.py", r"\[: rows\.start, rows\] = .*$", "[: rows.start, rows] *= 0.5", SEARCHES),
    Fault("quantize/ranges.py", r"^( +)(ranges_KO2 = )", r"\1assert weight_OS.amax() > 0\n\1\2", COSTS),
    Fault("quantize/ranges.py", r"\.add_\(2 \* pull_OS\)", ".add_(pull_OS)", SEARCHES),
    Fault(
        "quantize/factors.py", r"\[PLAIN, \*\((.*) if candidate != PLAIN\)\]", r"[\1 if candidate != PLAIN]", SEARCHES
    ),
    Fault(
        "quantize/recipes.py",
        r"Method\(factors, ranges, compensated\) if self\.compensate",
        "Method(factors, ranges) if self.compensate",
        JOB,
    ),
    Fault("quantize/memory.py", r'("one block": block),', r"\1 // 2,", COSTS),
    Fault("checkpoint/background.py", r"if kind is None:", "if False:", COSTS),
    Fault("quantize/verify.py", r"not error <= limit \+ ROUNDING", "False", JOB),
    Fault("quantize/memory.py", r'"the next block": stored', '"the next block": 0', JOB),
    Fault("quantize/job.py", r"^    with locked\(destination\):", "    if True:", JOB),
    Fault("quantize/journal.py", r"if changed := .*:$", "if False:", JOB),
    Fault("quantize/verify.py", r"if found != digests\[name\]:", "if found == '':", PUBLISHING),
    Fault("quantize/journal.py", r"elif why := problem\(record, len\(self\.blocks\)\):", "elif why := '':", PUBLISHING),
    Fault("quantize/journal.py", r"^( +)self\._append\(\{\"published\": list\(names\)\}\)", r"\1pass", PUBLISHING),
    Fault("quantize/job.py", r"^( +)check_side_files\(.*\)", r"\1pass", PUBLISHING),
    Fault("quantize/report.py", r"(of the layers' loss\") if plain > 0", r"\1 if True", PUBLISHING),
    Fault("quantize/compensation.py", r"if not moments_II\.any\(\):", "if False:", PUBLISHING),
    Fault("quantize/job.py", r"^( +)journal\.remove\(\)", r"\1pass", JOB),
    Fault("quantize/__main__.py", r"^( +)plan_sampling\(.*\)\.check\(device\)$", r"\1pass", JOB),
]
