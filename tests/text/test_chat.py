"""Chat templates: the text that transformers renders (tests/golden/make_chat.py), and what a template may not do."""

import contextlib
import json
import re
from datetime import datetime

import pytest

from miniawq.errors import InvalidInput, MiniawqError, UnsupportedCheckpoint, UsageError
from miniawq.text import chat
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import GOLDEN, tiny_tokenizers

HERE = GOLDEN
GOLDEN = json.loads((HERE / "chat.json").read_text(encoding="utf-8"))
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in (HERE / "chat").glob("*.jinja")}
ASK = [{"role": "user", "content": "Who spins?"}]


@pytest.fixture(autouse=True)
def _frozen_clock(monkeypatch):
    class FrozenClock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(GOLDEN["now"])

    monkeypatch.setattr(chat, "datetime", FrozenClock)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_rendered_text_is_that_of_transformers(name):
    bos, eos = GOLDEN["special_tokens"][name]
    special_tokens = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    cases = [case for case in GOLDEN["rendered"] if case["template"] == name]
    assert cases
    for case in cases:
        expected = case.get("text")
        with contextlib.nullcontext() if expected else pytest.raises(MiniawqError, match=re.escape(case["refused"])):
            text = chat.render(
                TEMPLATES[name],
                GOLDEN["conversations"][case["conversation"]],
                tools=GOLDEN["tools"] if case["tools"] else None,
                add_generation_prompt=case["add_generation_prompt"],
                variables=special_tokens | case["variables"],
            )
            assert text == expected, case


@pytest.mark.parametrize("name", GOLDEN["selections"])
def test_the_same_template_is_chosen_as_in_transformers(tmp_path, name):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level())
    for file, content in GOLDEN["selections"][name].items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.has_chat_template == (name != "none")
    for case in GOLDEN["selected"]:
        if case["name"] == name and "text" in case:
            assert tokenizer.render_chat(ASK, tools=GOLDEN["tools"] if case["tools"] else None) == case["text"]
        elif case["name"] == name:
            with pytest.raises(InvalidInput, match=r"chat_template, (is there: a base model|has rag)"):
                tokenizer.render_chat(ASK, tools=GOLDEN["tools"] if case["tools"] else None)


def test_the_processor_file_is_read_last(tmp_path):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), chat_template={"chat_template": "processor"})
    assert Tokenizer(tmp_path).render_chat(ASK) == "processor"
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), tokenizer_config={"chat_template": "config"})
    assert Tokenizer(tmp_path).render_chat(ASK) == "config"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": b'{"chat_template": 3}'},
        {"tokenizer_config.json": b'{"chat_template": [{"template": "no name"}]}'},
        {"tokenizer_config.json": b'{"chat_template": ["default"]}'},
        {"tokenizer_config.json": b'{"chat_template": {"default": ["x"]}}'},
        {"chat_template.json": b"{}"},
        {"chat_template.json": b"[]"},
        {"chat_template.jinja": b"\xff"},
    ],
)
def test_templates_that_cannot_be_read_are_refused(tmp_path, files):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"the chat template of .* cannot be read"):
        Tokenizer(tmp_path)


def test_special_tokens_reach_the_template_by_name(tmp_path):
    template = (
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ image_token }}|{{ add_bos_token is defined }}"
    )
    config = {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "pad_token": None,
        "image_token": "<image>",
        "add_bos_token": True,
        "chat_template": template,
    }
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), tokenizer_config=config))
    assert tokenizer.render_chat(ASK) == "<s>|</s>|False|<image>|False"


def test_a_rendered_chat_has_one_bos(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATES["mistral"]}
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_fallback(), tokenizer_config=config))
    rendered = tokenizer.render_chat(ASK)
    assert tokenizer.encode(rendered, add_special_tokens=False).count(tokenizer.bos_id) == 1
    assert tokenizer.encode(rendered).count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(
    ("template", "ends"),
    [("chatml_tools", {"<|im_end|>"}), ("llama2", {"</s>"}), ("mistral", {"</s>"}), ("zephyr", {"</s>"})],
)
def test_the_token_after_an_answer_ends_it(tmp_path, template, ends):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATES[template]}
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), tokenizer_config=config))
    found = {tokenizer.decode([token_id], skip_special_tokens=False) for token_id in tokenizer.end_of_turn_ids()}
    assert found == ends


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }} and on", "{{ raise_exception('no answers') }}", "{{ 1 / 0 }}", "", "{{ bos"]
)
def test_without_a_special_token_after_an_answer_there_is_none(tmp_path, template):
    config = {"chat_template": template}
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), tokenizer_config=config))
    assert tokenizer.end_of_turn_ids() == frozenset()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
        ("{{ messages|attr('__class__') }}{{ ''.__class__() }}", "SecurityError"),
        ("{% for i in range(10**8) %}{% endfor %}", "OverflowError"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'long ' * 99 }}{% endfor %}{% endfor %}",
            "OverflowError",
        ),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].text.strip() }}", "UndefinedError"),
        ("{% include 'other' %}", "TypeError"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(template, reason):
    with pytest.raises(UnsupportedCheckpoint, match=f"the chat template failed\n  {reason}"):
        chat.render(template, ASK)


def test_broken_and_oversized_templates_are_refused():
    with pytest.raises(UnsupportedCheckpoint, match="not valid Jinja"):
        chat.render("{% if %}", ASK)
    with pytest.raises(UnsupportedCheckpoint, match="too long"):
        chat.render("x" * (chat.MAX_TEMPLATE_CHARACTERS + 1), ASK)


def test_a_refusal_carries_the_words_of_the_template():
    with pytest.raises(UsageError, match="not system!\n  this template takes no system message") as caught:
        chat.render(TEMPLATES["mistral"], [{"role": "system", "content": "Be brief."}, *ASK])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", sorted(chat.PROTECTED_VARIABLES))
def test_variables_cannot_replace_the_conversation(name):
    with pytest.raises(UsageError, match=f"'{name}' cannot be set"):
        chat.render("{{ messages }}", ASK, variables={name: []})


def test_templates_see_plain_values_only():
    class Rich(dict):
        def leak(self):
            return "leaked"

    with pytest.raises(UnsupportedCheckpoint, match="UndefinedError"):
        chat.render("{{ messages[0].leak() }}", [Rich(role="user", content="x")])
    with pytest.raises(InvalidInput, match="must be JSON"):
        chat.render("", [{"role": "user", "content": object()}])
    with pytest.raises(InvalidInput, match="no messages"):
        chat.render("", [])
