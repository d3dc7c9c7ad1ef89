"""A checkpoint streamed through the method: our searches, grids, resume, memory, verification."""

from tests.planted.fault import Fault

SEARCHES, COSTS, JOB = (f"quantize/test_{name}" for name in ("searches", "costs", "job"))
PUBLISHING, NEIGHBOURS, HEAD = "quantize/test_publishing", "quantize/test_neighbours", "quantize/test_head"
NUMBERS = "quantize/test_formats"
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
        r"Method\(factors, ranges, neighbouring_codes\)",
        "Method(factors, ranges)",
        NEIGHBOURS,
    ),
    Fault("quantize/memory.py", r'("one block": block),', r"\1 // 2,", COSTS),
    Fault("checkpoint/background.py", r"if kind is None:", "if False:", COSTS),
    Fault("checkpoint/background.py", r"shutdown\(wait=False, cancel_futures=True\)", "shutdown()", COSTS),
    Fault("quantize/verify.py", r"not error <= 1 \+ ROUNDING", "False", JOB),
    Fault("quantize/memory.py", r'"the next block": stored', '"the next block": 0', JOB),
    Fault("quantize/job.py", r"^    with locked\(destination\):", "    if True:", JOB),
    Fault("quantize/journal.py", r"if changed := .*:$", "if False:", JOB),
    Fault("quantize/job.py", r"seconds_before \+ ", "", JOB),
    Fault("quantize/verify.py", r"if found != digests\[name\]:", "if found == '':", PUBLISHING),
    Fault("quantize/journal.py", r"elif why := problem\(record, len\(self\.blocks\)\):", "elif why := '':", PUBLISHING),
    Fault("quantize/journal.py", r"^( +)self\._append\(\{\"published\": list\(names\)\}\)", r"\1pass", PUBLISHING),
    Fault("quantize/job.py", r"^( +)check_side_files\(.*\)", r"\1pass", PUBLISHING),
    Fault("quantize/report.py", r"if not plain > 0 or not folds:", "if False:", PUBLISHING),
    Fault("quantize/descent.py", r"scale_O\.double\(\)\)\.floor_", "scale_O.double()).round_", NEIGHBOURS),
    Fault("quantize/descent.py", r"lowest_O > middle_CO", "lowest_O < middle_CO", NEIGHBOURS),
    Fault("quantize/neighbours.py", r"if sweep < SWEEPS", "if sweep <= SWEEPS", NEIGHBOURS),
    Fault("quantize/descent.py", r"found\[-1\] - error_O", "error_O - found[-1]", NEIGHBOURS),
    Fault("quantize/factors.py", r"found\[formula, best\] > worth", "found[formula, best] < worth", NEIGHBOURS),
    Fault("quantize/streams.py", r" - dense\.residual_TO", "", NEIGHBOURS),
    Fault("quantize/streams.py", r"\+ 2 \* \(error_OI", "+ (error_OI", NEIGHBOURS),
    Fault("quantize/job.py", r"parameter\.data = tensors\[name\].*$", "pass", NEIGHBOURS),
    Fault("quantize/job.py", r"parameter\.data = self\.stored\(.*$", "pass", NEIGHBOURS),
    Fault("quantize/streams.py", r"^( +)self\.attended = False$", r"\1pass", NEIGHBOURS),
    Fault("quantize/job.py", r"^( +)job\.streams\.follow\(.*\)$", r"\1pass", NEIGHBOURS),
    Fault("quantize/recipes.py", r"return 1\.0 if self\.learns else 0\.5", "return 1.0", JOB),
    Fault("quantize/verify.py", r"reach \* scale_OG", "2 * reach * scale_OG", NEIGHBOURS),
    Fault("awq.py", r"worse_O1 = \(losses\(found\) > plain_O\)", "worse_O1 = (losses(found) > torch.inf)", NEIGHBOURS),
    Fault("quantize/job.py", r"format_interval\(seconds \* left\)", "format_interval(seconds)", JOB),
    Fault("quantize/job.py", r"^( +)journal\.remove\(\)", r"\1pass", JOB),
    Fault("quantize/packable.py", r"for smaller in \(64, 32\)", "for smaller in (32,)", JOB),
    Fault("quantize/__main__.py", r"if told := left_dense\(.*\):", 'if told := "":', JOB),
    Fault("quantize/__main__.py", r"^( +)plan_sampling\(.*\)\.check\(device\)$", r"\1pass", JOB),
    Fault("quantize/head.py", r"seen\.add\(norm\((.*)\)\.flatten", r"seen.add((\1).flatten", HEAD),
    Fault("quantize/head.py", r"torch\.cat\(tensors\)", "tensors[0]", HEAD),
    Fault("quantize/job.py", r"self\.streams\.quantized_BLD if self\.streams else hidden_BLD", "hidden_BLD", HEAD),
    Fault(
        "quantize/job.py", r" \(layer \+ 1 < job\.blocks or job\.settings\.lm_head\)", " layer + 1 < job.blocks", HEAD
    ),
    Fault("quantize/job.py", r"checkpoint\.untied\(\) if settings\.lm_head else checkpoint", "checkpoint", HEAD),
    Fault("quantize/job.py", r"\{\*checkpoint\.tensors\.values\(\)\}", "checkpoint.tensors.values()", HEAD),
    Fault("quantize/memory.py", r"FLOAT if packs_head else 0", "FLOAT if False else 0", HEAD),
    Fault("quantize/formats.py", r"keepdim=True\) / 127\.5", "keepdim=True) / 127", NUMBERS),
    Fault("quantize/formats.py", r"magnitude < 4, 1\.0", "magnitude < 3, 1.0", NUMBERS),
    Fault("quantize/formats.py", r"exponent_OG1 - 1 - 2", "exponent_OG1 - 1 - 1", NUMBERS),
    Fault("quantize/formats.py", r"\+ 8\.5\)\.trunc", "+ 8).round", NUMBERS),
    Fault("quantize/formats.py", r"448\.0, 0\.125", "448.0, 2.0**-9", NUMBERS),
    Fault("quantize/formats.py", r" & \(lost_OG8 < least_OG8\)", "", NUMBERS),
    Fault("quantize/formats.py", r"error_SO\[row\], alpha=-1", "error_SO[row], alpha=0", NUMBERS),
    Fault("quantize/formats.py", r"weight_IO\[order_I\.argsort\(\)\]", "weight_IO[order_I]", NUMBERS),
    Fault("quantize/formats.py", r"\+ act_order \* 32 \* inputs", "", NUMBERS),
]
