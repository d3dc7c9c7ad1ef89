"""Chat templates: a list of messages becomes the text that a chat model was trained to continue.

A checkpoint carries its format as a Jinja template, a small program from a stranger. It runs in jinja2's immutable
sandbox and sees only plain JSON values. Its environment is that of Hugging Face transformers
(`utils/chat_template_utils.py`), for which templates are written:

    blocks       trim_blocks, lstrip_blocks; {% break %} and {% continue %}; {% generation %} passes its body through
    filters      tojson without HTML escapes
    functions    raise_exception(message), strftime_now(format)
    variables    messages, tools, documents, add_generation_prompt, and the checkpoint's special tokens by name

The sandbox bounds what a template can touch; the limits below bound its length and that of its text. Nothing bounds its
time and memory, as jinja2 documents: read a template (--show-prompt) before you serve it to strangers.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from miniawq.checkpoint.hub import parse_json
from miniawq.errors import InvalidInput, MiniawqError, UnsupportedCheckpoint, UsageError

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_RENDERED_CHARACTERS = 1 << 24

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
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    found, processor = tokenizer_config.get("chat_template"), directory / "chat_template.json"
    try:
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        if found is None and processor.is_file():
            found = parse_json(processor)["chat_template"]
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
    except (UnicodeDecodeError, TypeError, KeyError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from error
    named = found if isinstance(found, dict) else {} if found is None else {"default": found}
    if not all(isinstance(template, str) for template in named.values()):
        raise _unreadable(directory, "a template is a text, and this one is not")
    return named


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
    conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
    parsed = _parse(template)
    try:
        pieces = parsed.generate(
            messages=_plain(conversation),
            tools=_plain(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **_plain(variables),
        )
        return _written(pieces)
    except MiniawqError:
        raise
    except Exception as error:
        # A template is a program: it can raise whatever Python can.
        raise UnsupportedCheckpoint(
            "the chat template failed", f"{type(error).__name__}: {error}", "use --raw, or repair the template"
        ) from error


def _plain(value: Any) -> Any:
    """A copy of plain JSON types, so that a template never sees an object with methods of its own."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InvalidInput("messages, tools and template variables must be JSON values", str(error)) from error


def _written(pieces: Any) -> str:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MAX_RENDERED_CHARACTERS:
            raise OverflowError(f"it writes more than {MAX_RENDERED_CHARACTERS} characters")
    return "".join(kept)


@lru_cache(maxsize=8)
def _parse(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise UnsupportedCheckpoint(
            "the chat template is too long", f"{len(template)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UnsupportedCheckpoint("the chat template is not valid Jinja", str(error), "use --raw") from error


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own tojson writes < > & ' as escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> NoReturn:
    fix = "this template takes no system message: put its text at the head of the first user message"
    raise UsageError("the chat template refuses these messages", message, fix if "system" in str(message) else "")
