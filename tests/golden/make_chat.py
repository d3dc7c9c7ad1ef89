"""Render the golden chats with transformers itself: every template of tests/golden/chat, every way to choose one.

Templates are in the shapes that published checkpoints use. Needs `pip install transformers`; the tests need only what
this writes: `python tests/golden/make_chat.py` replaces tests/golden/chat.json.
"""

import json
import tempfile
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
NOW = "2024-07-26T12:00:00"

SYSTEM = {"role": "system", "content": "You are a miller's daughter.\nSpin <straw> & 'gold'."}
ASK = {"role": "user", "content": "  What is your name? {{ not_a_variable }} 👋🏽 "}
ANSWER = {"role": "assistant", "content": ' Rumpelstilzchen, "they" say.\n'}
AGAIN = {"role": "user", "content": "Is it Kaspar, Melchior or Balzer?"}
THOUGHT = {"role": "assistant", "content": "<think>\nThree names.\n</think>\n\nNone of them.", "tool_calls": None}
REASONED = {"role": "assistant", "content": "None of them.", "reasoning_content": "Three names."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "abcdef123", "type": "function", "function": {"name": "spin", "arguments": {"straw": 3, "an": "é<&>"}}}
    ],
}
RESULT = {"role": "tool", "content": '{"gold": 3}', "tool_call_id": "abcdef123", "name": "spin"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.title()}s <straw> into 'gold'.",
            "parameters": {"type": "object", "properties": {"straw": {"type": "integer"}}, "required": ["straw"]},
        },
    }
    for name in ("spin", "weave")
]

CONVERSATIONS = {
    "ask": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [ASK, ANSWER, AGAIN],
    "system-turns": [SYSTEM, ASK, ANSWER, AGAIN, THOUGHT],
    "reasoned": [ASK, REASONED, AGAIN, REASONED],
    "called": [ASK, CALL, RESULT],
    "two-asks": [ASK, ASK],
    "odd-role": [{"role": "note", "content": "aside"}, ASK],
}
VARIABLES = {
    "llama31": [
        {"date_string": "1 Jan 1812"},
        {"tools_in_user_message": False},
        {"builtin_tools": ["search", "code_interpreter"]},
    ],
    "thinking": [{"enable_thinking": True}, {"enable_thinking": False}],
}
SPECIAL = {
    "llama2": ("<s>", "</s>"),
    "llama31": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "zephyr": ("<s>", "</s>"),
    "training": (None, "</s>"),
}

SELECTIONS = {
    "string": {"tokenizer_config.json": {"chat_template": "string"}},
    "list": {"tokenizer_config.json": {"chat_template": [
        {"name": "default", "template": "default of list"}, {"name": "tool_use", "template": "tool_use of list"}]}},
    "list without default": {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "rag of list"}]}},
    "file over config": {"tokenizer_config.json": {"chat_template": "string"}, "chat_template.jinja": "file"},
    "files": {
        "tokenizer_config.json": {"chat_template": "string"},
        "chat_template.jinja": "file",
        "additional_chat_templates/tool_use.jinja": "additional file",
    },
    "none": {"tokenizer_config.json": {}},
}  # fmt: skip


class FrozenClock(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(NOW)


def empty_tokenizer(**kwargs):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **kwargs)


def rendered(tokenizer, messages, **kwargs):
    try:
        return {"text": tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)}
    except Exception as error:
        return {"refused": str(error)}


def template_cases():
    for path in sorted((HERE / "chat").glob("*.jinja")):
        bos, eos = SPECIAL.get(path.stem, (None, "<|im_end|>"))
        tokenizer = empty_tokenizer(bos_token=bos, eos_token=eos, chat_template=path.read_text(encoding="utf-8"))
        options = [{}, *VARIABLES.get(path.stem, [])]
        for name, messages in CONVERSATIONS.items():
            for variables in options:
                for tools in (None, TOOLS):
                    for add_generation_prompt in [True] if variables else [False, True]:
                        found = rendered(
                            tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
                        )
                        yield {
                            "template": path.stem,
                            "conversation": name,
                            "tools": tools is not None,
                            "add_generation_prompt": add_generation_prompt,
                            "variables": variables,
                            **found,
                        }


def selection_cases():
    for name, files in SELECTIONS.items():
        with tempfile.TemporaryDirectory() as directory:
            empty_tokenizer().save_pretrained(directory)
            for file, content in files.items():
                path = Path(directory, file)
                path.parent.mkdir(exist_ok=True)
                path.write_text(content if isinstance(content, str) else json.dumps(content))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            for tools in (None, TOOLS):
                yield {"name": name, "tools": tools is not None, **rendered(tokenizer, [ASK], tools=tools)}


def main():
    chat_template_utils.datetime = FrozenClock
    golden = {
        "now": NOW,
        "tools": TOOLS,
        "conversations": CONVERSATIONS,
        "special_tokens": {
            path.stem: SPECIAL.get(path.stem, (None, "<|im_end|>")) for path in (HERE / "chat").glob("*.jinja")
        },
        "selections": SELECTIONS,
        "selected": list(selection_cases()),
        "rendered": list(template_cases()),
    }
    (HERE / "chat.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
