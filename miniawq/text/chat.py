"""Chat templates: a list of messages becomes the text that a chat model was trained to continue.

A checkpoint carries its format as a Jinja template, a small program from a stranger. It runs in jinja2's immutable
sandbox, in a process of its own with a budget of time and memory (`worker.py`). It sees only plain JSON values:
messages, tools, documents, add_generation_prompt, and the checkpoint's special tokens by name. `template.py` has what
else a template may use.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from miniawq.checkpoint.strict import parse_json
from miniawq.errors import InvalidInput, UnsupportedCheckpoint, UsageError
from miniawq.text.worker import FIX, ask_worker

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_TEMPLATES = 100

# Whoever may set template variables must not be able to replace the conversation itself (CVE-2025-62426).
PROTECTED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message"}
)

Message = Mapping[str, Any]


def read_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint by name, usually just "default"; empty for a base model.

    As in transformers (`tokenization_utils_base.py`, `_from_pretrained`), template files replace the value in
    `tokenizer_config.json`, which replaces that of `chat_template.json`.
    """
    single = directory / "chat_template.jinja"
    files = {"default": single} if single.is_file() else {}
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    files |= {path.stem: path for path in others if path.is_file()}
    found, processor = tokenizer_config.get("chat_template"), directory / "chat_template.json"
    try:
        if len(files) > MAX_TEMPLATES:
            raise _unreadable(directory, f"there are {len(files)} of them; the limit is {MAX_TEMPLATES}")
        if files:
            return {name: _read_template(path) for name, path in files.items()}
        if found is None and processor.is_file():
            found = parse_json(processor)["chat_template"]
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
    except (OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from error
    named = found if isinstance(found, dict) else {} if found is None else {"default": found}
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise _unreadable(directory, "a template is a text, and so is its name; this one is not")
    return named


def _read_template(path: Path) -> str:
    """The text of a file, which is not read further than a template may be long."""
    with open(path, encoding="utf-8", newline=None) as file:
        return file.read(MAX_TEMPLATE_CHARACTERS + 1)


def _unreadable(directory: Path, why: str) -> UnsupportedCheckpoint:
    fix = "look at chat_template in tokenizer_config.json and at the files named after it"
    return UnsupportedCheckpoint(f"the chat template of {directory} cannot be read", why, fix)


def select_template(templates: Mapping[str, str], with_tools: bool) -> str:
    """The template named "tool_use" if there is one and tools are given, else the one named "default"."""
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if not templates:
        raise InvalidInput(
            "this checkpoint has no chat template",
            "neither chat_template.jinja nor tokenizer_config.json, key chat_template, is there: a base model",
            "give it text to continue instead of messages (on the command line: --raw)",
        )
    raise InvalidInput(
        "this checkpoint has several chat templates and none is the default",
        f"tokenizer_config.json, key chat_template, has {', '.join(sorted(templates))}",
        'name one of them "default" in a copy of the file',
    )


def check_variables(variables: Mapping[str, Any]) -> None:
    """UsageError if `variables` would replace the conversation itself."""
    for name in sorted(PROTECTED_VARIABLES & variables.keys()):
        raise UsageError(
            f"the template variable {name!r} cannot be set",
            "it belongs to the conversation, not to the template's options",
            "pass messages and tools as such",
        )


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation. Encode it with `add_special_tokens=False`: a template writes its own BOS.

    `messages` are {"role": ..., "content": ...}, `tools` are JSON schemas of functions, `variables` are the special
    tokens and the template's own options, such as `enable_thinking`.
    Raises UsageError with the template's own words if it refuses the messages, UnsupportedCheckpoint if it fails.
    """
    variables = dict(variables or {})
    check_variables(variables)
    if len(messages) == 0:
        raise InvalidInput("there are no messages to render", "", "give at least one, from the user")
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        why = f"{len(template)} characters or more; the limit is {MAX_TEMPLATE_CHARACTERS}"
        raise UnsupportedCheckpoint("the chat template is too long", why)
    values = variables | {
        "messages": _without_none(messages),
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    answer = ask_worker(_plain({"template": template, "now": datetime.now().isoformat(), "values": values}))
    match answer:
        case {"text": text}:
            return text
        case {"refused": words}:
            fix = "this template takes no system message: put its text at the head of the first user message"
            raise UsageError("the chat template refuses these messages", words, fix if "system" in words else "")
        case {"invalid": why}:
            raise UnsupportedCheckpoint("the chat template is not valid Jinja", why, FIX)
    raise UnsupportedCheckpoint("the chat template failed", answer["failed"], FIX)


def _without_none(messages: Iterable[Message]) -> list[dict[str, Any]]:
    try:
        return [{key: value for key, value in message.items() if value is not None} for message in messages]
    except AttributeError as error:
        why = 'each is an object, such as {"role": "user", "content": "..."}'
        raise InvalidInput("a message is not an object", why) from error


def _plain(value: Any) -> bytes:
    """One line of JSON, so that a template never sees an object with methods of its own."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InvalidInput("messages, tools and template variables must be JSON values", why) from error
