"""The verbs beside generate and quantize."""

from tests.planted.fault import Fault

CONVERT, PLAN, EVALUATE, CONTEST = (f"commands/test_{name}" for name in ("convert", "plan", "evaluate", "contest"))
BENCH = "commands/test_bench"
MANY, FLAGS, THOUGHTS = (f"commands/test_{name}" for name in ("many", "flags", "thoughts"))
FAULTS = [
    Fault("commands/bench.py", r"rows \* new_tokens / generation$", "new_tokens / generation", BENCH),
    Fault("commands/bench.py", r"\(3600 \* tokens_per_s\)", "tokens_per_s", BENCH),
    Fault("commands/bench.py", r"new_tokens \+ 1\):", "new_tokens):", BENCH),
    Fault("commands/bench.py", r"PREFILL_CHUNK // rows", "PREFILL_CHUNK", BENCH),
    Fault("commands/bench.py", r"min\(found\) < 1", "False", BENCH),
    Fault("engine/memory.py", r"\+ rows \* positions \*", "+ positions *", BENCH),
    Fault("commands/records.py", r'split\("\\n"\)\[:-1\]', "splitlines()", MANY),
    Fault("commands/records.py", r"if number >= len\(names\) or", "if", MANY),
    Fault("commands/records.py", r"if number > self\.written:", "if False:", MANY),
    Fault("commands/records.py", r"written < number < len\(names\) and", "", MANY),
    Fault("commands/records.py", r"while self\.written in", "if self.written in", MANY),
    Fault("commands/records.py", r"self\._file\.truncate\(\)", "pass", MANY),
    Fault("commands/many.py", r"= self\.asked\[ending\.number\]", "= ending.number", MANY),
    Fault("commands/many.py", r"and self\.records\.earlier:", "and False:", MANY),
    Fault("commands/prompts.py", r"return stat\.S_ISFIFO\(mode\) or", "return", FLAGS),
    Fault("commands/prompts.py", r"\+ \(arguments\.prefill_response or \"\"\)", "", THOUGHTS),
    Fault("commands/prompts.py", r'"enable_thinking": arguments\.think', '"enable_thinking": True', THOUGHTS),
    Fault("commands/telling.py", r"if completion\.ids\[told:\]:", "if False:", FLAGS),
    Fault("commands/together.py", r"1 << \(self\.rows\.bit_length\(\) - 1\)", "self.rows", MANY),
    Fault("commands/samples.py", r"waiting\.pop\(told, None\)", "waiting.pop(ending.number, None)", FLAGS),
    Fault("commands/talking.py", r"limit // 2 and", "limit and", "test_generate"),
    Fault("commands/talking.py", r"messages\[: asked\[0\]\] \+ ", "", "test_generate"),
    Fault("commands/context.py", r"if 0 < most < longest:", "if False:", "test_generate"),
    Fault("commands/thoughts.py", r"len\(held\) - overlap\(held, tag\)", "len(held)", THOUGHTS),
    Fault("commands/thoughts.py", r' and not os\.environ\.get\("NO_COLOR"\)', "", THOUGHTS),
    Fault("cli.py", r"(for action in self\._actions\}) - COMMON", r"\1", FLAGS),
    Fault("__main__.py", r"except MissingExtra as error:", "except MemoryError as error:", "commands/test_verbs"),
    Fault("cli.py", r"0\], known, 1\)", "0], known, 0 + 1, 0.99)", FLAGS),
    Fault("engine/sampling.py", r"logits_BV\.float\(\)\.log_softmax", "(logits_BV.float() * 2).log_softmax", FLAGS),
    Fault("commands/convert.py", r"symmetric = all\(", "symmetric = any(", CONVERT),
    Fault("commands/convert.py", r'for leaf in \("weight", "bias"\):', 'for leaf in ("weight",):', CONVERT),
    Fault("commands/convert.py", r'if key != "compression_config"\}', "if key not in CONFIG_KEYS}", CONVERT),
    Fault("commands/convert.py", r"if len\(sizes\) == 1:", "if sizes:", CONVERT),
    Fault("commands/convert.py", r"BYTES_A_WEIGHT \* largest", "largest", CONVERT),
    Fault("commands/plan.py", r"min\(degree, kv_heads\) if part in .* else degree", "degree", PLAN),
    Fault("commands/plan.py", r"1 if whole_rows else linear\.group_size", "1", PLAN),
    Fault("commands/plan.py", r"outputs=128, ", "outputs=64, ", PLAN),
    Fault("commands/plan.py", r"for engine in NEED_ZEROS", "for engine in NEED_ZEROS[:1]", PLAN),
    Fault("commands/plan.py", r"if heads % degree or", "if", PLAN),
    Fault(
        "commands/plan.py", r'if name == "lm_head\.weight" and model_config\.tie_word_embeddings:', "if False:", PLAN
    ),
    Fault("cli.py", r"^( +)_require_memory\(\)\n( +code)", r"\2", "commands/test_verbs"),
    Fault("cli.py", r"^    _open_streams\(\)\n", "", "commands/test_verbs"),
    Fault("commands/evaluate.py", r"if ours != theirs:", "if False:", EVALUATE),
    Fault("commands/evaluate.py", r"value is not None and value < least", "False", EVALUATE),
    Fault(
        "commands/scores.py",
        r"torch\.tensor\(ids\[: count \* length\]\)",
        "torch.tensor((*ids[1:], ids[0])[: count * length])",
        EVALUATE,
    ),
    Fault("commands/scores.py", r"tokens_L\[places\.start \+ 1 : places\.stop \+ 1\]", "tokens_L[places]", EVALUATE),
    Fault("commands/evaluate.py", r"ids = tokenizer\.encode\(text\)", "ids = [0, *tokenizer.encode(text)]", EVALUATE),
    Fault(
        "commands/scores.py",
        r"divmod\(index, tokens_BL\.shape\[1\] - 1\)",
        "divmod(index, tokens_BL.shape[1])",
        EVALUATE,
    ),
    Fault("commands/evaluate.py", r"if crowded else None", "if False else None", EVALUATE),
    Fault("commands/contest.py", r"DENSE_BITS \* rest", "DENSE_BITS", CONTEST),
    Fault(
        "commands/contest.py",
        r"^            advance\(stream, ours, layer, entry\.hidden_BLD\)",
        "            advance(stream, block, layer, entry.hidden_BLD)",
        CONTEST,
    ),
    Fault(
        "commands/contest.py", r"^( +)advance\(self\.text\.stream, block, layer, self\.hidden_BLD\)", r"\1pass", CONTEST
    ),
    Fault("commands/contest.py", r"copy\.deepcopy\(self\.text\.statistics\)", "self.text.statistics", CONTEST),
]
