"""Tokenizer, chat templates, streaming text."""

from tests.planted.fault import Fault

TOKENIZER, CHAT = "text/test_tokenizer", "text/test_chat"
FAULTS = [
    Fault("text/tokenizer.py", r"\[\] if ids\[:1\] == \[self\.bos_id\] else self\._prefix", "self._prefix", TOKENIZER),
    Fault("text/tokenizer.py", r"or text\.endswith\(REPLACEMENT\) ", "", TOKENIZER),
    Fault("text/tokenizer.py", r" or self\._tokenizer\.is_byte\(token_id\)", "", TOKENIZER),
    Fault("text/tokenizer.py", r"tokenizer\.no_truncation\(\)", "pass", TOKENIZER),
    Fault("text/chat.py", r"trim_blocks=True, ", "", CHAT),
    Fault("text/chat.py", r"ImmutableSandboxedEnvironment\(\n", "jinja2.Environment(\n", CHAT),
    Fault("text/chat.py", r"size > MAX_RENDERED_CHARACTERS", "False", CHAT),
    Fault("text/chat.py", r"len\(template\) > MAX_TEMPLATE_CHARACTERS", "False", CHAT),
    Fault("text/chat.py", r"sorted\(PROTECTED_VARIABLES & variables\.keys\(\)\)", "()", CHAT),
    Fault("text/chat.py", r"(if with_tools) and \"tool_use\" in templates", r'if "tool_use" in templates', CHAT),
]
