"""The text that a model continues: from flags, files or stdin, through the chat template if there is one."""

import argparse
import json
import logging
import os
import re
import stat
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from miniawq import cli
from miniawq.errors import InvalidInput, UsageError
from miniawq.text.chat import Message, check_variables
from miniawq.text.plain import read_text
from miniawq.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds until a wait is told
DEMO_PROMPT = "Once upon a time"
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
Tools = list[dict[str, Any]] | None


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `read_prompt` and `system_message` read."""
    together = "text, file and pipe follow each other, if several are given"
    add = parser.add_argument_group("prompt", together).add_argument
    add("--prompt", "-p", metavar="TEXT", help="text to answer or to continue; - for stdin")
    add("--escape", "-e", action="store_true", help=r"take \n, \t, \\ and the like in --prompt for what they stand for")
    add("--file", "-f", type=Path, metavar="FILE", help="file with the prompt")
    add("--messages", type=Path, metavar="FILE", help='JSON: a list of messages, or {"messages": ..., "tools": ...}')
    add("--interactive", "--chat", "-i", action="store_true", help="talk with a chat model")
    add("--prompts", type=Path, metavar="FILE", help="one a line, or JSONL: prompt or messages, and id")
    add = parser.add_argument_group("chat template").add_argument
    add("--system-prompt", "--system", metavar="TEXT", help="system message of the conversation")
    thinks = "whether a thinking model thinks (the template's)"
    add("--think", action=argparse.BooleanOptionalAction, help=thinks)
    add("--prefill-response", metavar="TEXT", help="what the answer begins with")
    as_it_is = "continue the text as it is, without the template"
    add("--raw", "--no-chat-template", "--ignore-chat-template", action="store_true", help=as_it_is)
    instead = "Jinja template in place of the checkpoint's: a file, or its text"
    add("--chat-template", metavar="TEMPLATE", help=instead)
    names = "--chat-template-kwargs", "--chat-template-config"
    add(*names, metavar="JSON", type=_json_object, default={}, help="variables for the template")
    shown = "show the text that the model continues, on stderr, control characters as escapes"
    add("--show-prompt", action="store_true", help=shown)


def is_story(arguments: argparse.Namespace, prompt: str) -> bool:
    """Whether the demo begins in its own words, which are part of what it tells."""
    return arguments.prompt is None and not arguments.messages and prompt == DEMO_PROMPT


def check_prompt_flags(arguments: argparse.Namespace) -> None:
    """UsageError on flags that do not go together."""
    check_variables(arguments.chat_template_kwargs)
    text = arguments.prompt is not None or arguments.file is not None
    sources = {
        "--prompt or --file": text,
        "--messages": arguments.messages,
        "--prompts": arguments.prompts,
        "--interactive": arguments.interactive,
    }
    given = [flag for flag, value in sources.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} do not go together", "each of them is the whole prompt", "give one")
    if arguments.escape and arguments.prompt in (None, "-"):
        raise UsageError("--escape is for --prompt TEXT", "files and pipes are read as they are")
    if arguments.model and not given and not is_piped():
        raise UsageError("there is no prompt", "", "give --prompt, --file, --messages, --prompts or --interactive")
    needs_template = (
        arguments.system_prompt,
        arguments.prefill_response,
        arguments.think is not None,
        arguments.messages,
        arguments.chat_template,
        arguments.chat_template_kwargs,
        arguments.interactive,
    )
    if arguments.raw and any(needs_template):
        names = (
            "--system-prompt, --prefill-response, --think, --messages, --interactive, --chat-template and its kwargs"
        )
        raise UsageError(f"--raw goes with none of {names}", "they are for the chat template, which --raw leaves out")


def given_template(arguments: argparse.Namespace) -> str | None:
    """The text of --chat-template, which names a file unless it has a brace."""
    given: str | None = arguments.chat_template
    return given if given is None or "{" in given else read_text(given)


def check_template(arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """UsageError if the checkpoint's template, or its absence, does not go with the flags."""
    if (arguments.interactive or arguments.prefill_response) and not tokenizer.has_chat_template:
        raise UsageError(
            "this model cannot talk",
            "it has no chat template: a base model",
            "use --prompt, name a chat model, or give --chat-template",
        )
    if arguments.think is not None and not tokenizer.template_mentions("enable_thinking"):
        why = "its chat template never asks for enable_thinking"
        raise UsageError("this model cannot be told to think, or not to", why, "leave --think and --no-think out")


def system_message(arguments: argparse.Namespace) -> list[Message]:
    """The message of --system-prompt; none if the flag is not given."""
    return [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt else []


def read_prompt(arguments: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The text to continue, and whether the chat template wrote it."""
    if arguments.messages:
        return as_turn(arguments, tokenizer, *read_messages(arguments.messages)), True
    typed = "" if arguments.prompt in (None, "-") else arguments.prompt
    typed = unescaped(typed) if arguments.escape else typed
    read = read_text(arguments.file) if arguments.file else ""
    piped = read_stdin() if arguments.prompt == "-" or is_piped() else ""
    text = "\n\n".join(part for part in (typed, read, piped) if part)
    if not text and arguments.prompt is None and not arguments.file:
        if arguments.model:
            raise UsageError("there is no prompt", "the pipe was empty", "give --prompt, or write into the pipe")
        text = DEMO_PROMPT
    return as_prompt(arguments, tokenizer, text), is_chat(arguments, tokenizer)


def unescaped(text: str) -> str:
    """The text with what its escapes stand for; a backslash before any other character stays."""
    return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[0]), text)


def is_piped() -> bool:
    """Whether stdin is a pipe or a file, which somebody has chosen; not a terminal, nor /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_stdin() -> str:
    """All of stdin. After a while it is said what is waited for: the pipe of another program may stay open."""
    waits = threading.Timer(PATIENCE, lambda: log.info("reading the prompt from stdin, until it is closed"))
    waits.daemon = True
    waits.start()
    try:
        return read_text("-")
    finally:
        waits.cancel()


def is_chat(arguments: argparse.Namespace, tokenizer: Tokenizer) -> bool:
    """Whether a text becomes a message; a base model continues it."""
    return not arguments.raw and bool(tokenizer.has_chat_template or arguments.system_prompt)


def as_prompt(arguments: argparse.Namespace, tokenizer: Tokenizer, text: str) -> str:
    """A text of the user as the model gets it."""
    return as_turn(arguments, tokenizer, [{"role": "user", "content": text}]) if is_chat(arguments, tokenizer) else text


def as_turn(
    arguments: argparse.Namespace, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = None
) -> str:
    """A conversation as the model gets it, after the system message of the flag."""
    return rendered(arguments, tokenizer, [*system_message(arguments), *messages], tools)


def rendered(
    arguments: argparse.Namespace, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = None
) -> str:
    """A conversation as the template writes it, up to the beginning of the answer."""
    thinks = {} if arguments.think is None else {"enable_thinking": arguments.think}
    text = tokenizer.render_chat(messages, tools=tools, **arguments.chat_template_kwargs | thinks)
    return text + (arguments.prefill_response or "")


def read_messages(path: Path) -> tuple[list[Message], Tools]:
    """The messages and tools of a JSON file."""
    text = read_text(path)
    try:
        return messages_in(json.loads(text))
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        why, fix = f"{path}: {type(error).__name__}: {error}", 'write [{"role": "user", "content": "..."}]'
        raise InvalidInput("the messages cannot be read", why, fix) from error


def messages_in(given: Any) -> tuple[list[Message], Tools]:
    """Those of a list of messages, or of an object that has them; TypeError or KeyError if it is neither."""
    messages, tools = (given["messages"], given.get("tools")) if isinstance(given, dict) else (given, None)
    for name, listed in (("messages", messages), ("tools", tools or [])):
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise TypeError(f"{name} are not a list of objects")
    return messages, tools


def show(arguments: argparse.Namespace, prompt: str) -> None:
    """Say what the model continues, if --show-prompt asks for it."""
    if arguments.show_prompt:
        cli.say(prompt, limit=None)


def bar(pieces: Sequence[Tensor], is_quiet: bool) -> Iterable[Tensor]:
    """The pieces of a prompt, with a bar at a terminal if they take longer than a second."""
    return tqdm(pieces, "reading the prompt", unit="piece", leave=False, delay=1, disable=is_quiet or None)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"enable_thinking": false}}')
    return found
