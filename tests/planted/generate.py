"""The loop from prompt to last token, and its command line."""

from tests.planted.fault import Fault

COMPLETION, GENERATE, RUNS = "engine/test_completion", "test_generate", "commands/test_hostile_runs"
FAULTS = [
    Fault("generate.py", r"max\(1, prefill_chunk // batch\)", "prefill_chunk", COMPLETION),
    Fault("generate.py", r"is_on and token_id not in stop_ids", "token_id not in stop_ids", COMPLETION),
    Fault("generate.py", r"if NOT_A_NUMBER in ids:", "if False:", COMPLETION),
    Fault("generate.py", r"clear\(decoder, row, 0\)", "pass", "engine/test_cached_text"),
    Fault(
        "commands/context.py",
        r"longest if arguments\.max_seq_len is None else arguments\.max_seq_len",
        "arguments.max_seq_len or longest",
        RUNS,
    ),
    Fault("commands/context.py", r"left if wanted == -1 else", "wanted if wanted == -1 else", GENERATE),
    Fault("commands/context.py", r"return prompt_length \+ self", "return self", GENERATE),
    Fault("generate.py", r', "overhead": arguments\.memory_margin', "", GENERATE),
    Fault("generate.py", r'"batch": rows', '"batch": 1', "commands/test_configuration"),
    Fault("generate.py", r"add_special_tokens=not is_chat", "add_special_tokens=True", GENERATE),
]
