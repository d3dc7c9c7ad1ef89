"""Tokenizer, chat templates, streaming text."""

from tests.planted.fault import Fault

TOKENIZER, CHAT, TEMPLATES = "text/test_tokenizer", "text/test_chat", "text/test_hostile_templates"
HOSTILE = "text/test_hostile_tokenizers"
FAULTS = [
    Fault("text/tokenizer.py", r"\[\] if ids\[:1\] == \[self\.bos_id\] else self\._prefix", "self._prefix", TOKENIZER),
    Fault("text/tokenizer.py", r"or text\.endswith\(REPLACEMENT\) ", "", TOKENIZER),
    Fault("text/tokenizer.py", r" or self\._tokenizer\.is_byte\(token_id\)", "", TOKENIZER),
    Fault("text/library.py", r"self\.raw\.no_truncation\(\)", "pass", TOKENIZER),
    Fault("text/template.py", r"trim_blocks=True, ", "", CHAT),
    Fault("text/template.py", r"ImmutableSandboxedEnvironment\(\n", '__import__("jinja2").Environment(\n', CHAT),
    Fault("text/template.py", r"size > MAX_RENDERED_CHARACTERS", "False", CHAT),
    Fault("text/library.py", r"len\(text\) \* self\.growth > MAX_CHARACTERS", "False", HOSTILE),
    Fault("text/library.py", r"thread\.join\(seconds\)", "thread.join()", HOSTILE),
    Fault("text/library.py", r"^ +with silence:\n( +)return work\(\)", r"\1return work()", HOSTILE),
    Fault("text/library.py", r"^            self\._within -= 1\n", "            self._within = 0\n", HOSTILE),
    Fault("text/library.py", r"model\.dropout = None", "model.dropout = 0.9", HOSTILE),
    Fault("text/library.py", r"if any\(found\):", "if False:", HOSTILE),
    Fault("text/tokenizer.py", r"if not isinstance\(found, dict\):", "if False:", "reliability/test_fuzz"),
    Fault("text/tokenizer.py", r"type\(token_id\) is int", "isinstance(token_id, int)", HOSTILE),
    Fault("text/ggml.py", r"float\(-ranks", "float(ranks", "text/test_ggml"),
    Fault("text/ggml.py", r'bool\(model\.get\("ignore_merges"\)\)', "False", "text/test_ggml"),
    Fault("text/ggml.py", r"and pair not in pairs:", "and False:", "text/test_ggml"),
    Fault("text/worker.py", r"spent > SECONDS", "spent > 20 * SECONDS", TEMPLATES),
    Fault("text/worker.py", r"memory_info\(\)\.rss > MEMORY", "memory_info().rss < 0", TEMPLATES),
    Fault("text/chat.py", r"len\(template\) > MAX_TEMPLATE_CHARACTERS", "False", CHAT),
    Fault("text/chat.py", r"sorted\(PROTECTED_VARIABLES & variables\.keys\(\)\)", "()", CHAT),
    Fault("text/chat.py", r"(if with_tools) and \"tool_use\" in templates", r'if "tool_use" in templates', CHAT),
]
