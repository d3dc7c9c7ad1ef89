"""The command line of generate: what goes to which stream, what each flag does, what each error says."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from miniawq import generate, hardware
from miniawq.checkpoint.hub import DEMO
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import prompts
from miniawq.engine.memory import footprint
from miniawq.engine.step import DecodeStep
from miniawq.engine.verifying import SpeculativeStep
from miniawq.errors import DoesNotFit, NotFound, UsageError
from miniawq.generate import build_parser, complete, load, main
from miniawq.hardware import DeviceMemory
from miniawq.model import KVCache
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_checkpoints
from tests.helpers.chat_models import make_chat_model

FLAGS = """
--batch-size --cache-dir --chat --chat-template --chat-template-config --chat-template-kwargs --compile
--context-shift --ctx-size --debug --device --dtype --escape --extra-eos-token --file --frequency-penalty --greedy
--help --help-all --ignore-chat-template --ignore-eos --interactive --json --kv-cache-dtype --kv-dtype --list-devices
--local-files-only --logprobs --max-model-len --max-new-tokens --max-seq-len --max-tokens --memory-margin --messages
--min-p --model --n-predict --no-chat-template --no-compile --no-context-shift --no-memory-check --no-stream
--no-think --num-samples --offline --output --output-format --prefill-response --presence-penalty --prompt --prompts
--quiet --raw --repeat-last-n --repeat-penalty --repetition-penalty --resume --reverse-prompt --revision --seed
--show-config --show-prompt --speculate --stats --stop --stream --system --system-prompt --temp --temperature --think
--token --top-k --top-p --trust-remote-code --verbose --version -c -e -f -h -i -m -n -o -p -q -r -v
"""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat"))


def run(capsys, *flags):
    """Exit code, stdout and stderr of the command line."""
    code = main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def prompt_of(capsys, *flags):
    """The text that a model is given to continue."""
    code, _, err = run(capsys, *flags, "--show-prompt", "-n", 1, "-q")
    assert code == 0
    return err.removesuffix("\n")


def test_flags_are_these():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert sorted(flags) == FLAGS.split()


def test_the_demo_tells_a_story():
    command = [sys.executable, "-X", "importtime", "-m", "miniawq.generate", "-n", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith(prompts.DEMO_PROMPT)
    assert len(done.stdout.split()) >= 20
    messages = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(messages) == 1
    assert re.match(r"Generation: 40 tokens, \d+\.\d tokens-per-sec \(seed 0\)", messages[0])
    assert re.search(r"\| +miniawq\.engine\.completion$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +miniawq\.generate$", done.stderr, re.MULTILINE), "imported twice"
    assert not re.search(r"\| +torch\._dynamo$", done.stderr, re.MULTILINE), "which takes seconds"


def test_the_same_seed_prints_the_same_text(capsys):
    first = run(capsys, "-n", 8, "--seed", 3)[1]
    assert run(capsys, "-n", 8, "--seed", 3)[1] == first
    assert run(capsys, "-n", 8, "--seed", 4)[1] != first
    both = run(capsys, "-n", 8, "--seed", 3, "--num-samples", 2)[1]
    assert both == first + "\n" + run(capsys, "-n", 8, "--seed", 4)[1]


def test_without_a_seed_a_model_draws_one_and_says_it(capsys, fairytales):
    flags = [fairytales, "-p", "Once", "-n", 4, "--temperature", 3]
    seeds = {re.search(r"\(seed (\d+)\)", run(capsys, *flags)[2])[1] for _ in range(2)}
    assert len(seeds) == 2
    text = run(capsys, *flags, "--seed", min(seeds))[1]
    assert run(capsys, *flags, "--seed", min(seeds))[1] == text


def test_text_is_that_of_the_library(capsys, fairytales):
    code, out, err = run(capsys, "--model", fairytales, "--prompt", "Once upon a time", "--temperature", 0, "-n", 30)
    model, tokenizer = load(fairytales)
    expected = "".join(complete(model, tokenizer, tokenizer.encode("Once upon a time"), max_tokens=30))
    assert (code, out) == (0, expected + "\n")
    assert "seed" not in err


def test_quiet_says_nothing_and_stats_say_all(capsys, fairytales):
    flags = [fairytales, "-p", "Once", "-n", 4, "--greedy"]
    code, text, err = run(capsys, *flags, "-q")
    assert (code, err) == (0, "")
    code, out, err = run(capsys, *flags, "--stats", "--presence-penalty", 1e-6)
    assert out == text
    lines = err.splitlines()
    patterns = [
        r"Prompt: \d+ tokens, [\d.]+ tokens-per-sec",
        r"Generation: 4 tokens, [\d.]+ tokens-per-sec, [\d.]+ GB of weights read per second",
        r"Time to first token: [\d.]+ s",
        r"Loading: [\d.]+ s; compiling: 0\.000 s",
        r"Peak memory: [\d.]+ GB",
        r"Sampling: temperature 0, presence_penalty 1e-06, seed \d+",
    ]
    assert [bool(re.fullmatch(pattern, line)) for pattern, line in zip(patterns, lines, strict=True)] == [True] * 6


def test_json_is_one_object_a_line(capsys, fairytales):
    flags = [fairytales, "-p", "Once", "--max_tokens=3", "--top-k", 5, "--seed", 8, "--num-samples", 2, "--json", "-q"]
    code, out, _ = run(capsys, *flags)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [record["seed"] for record in records] == [8, 9]
    assert set(records[0]) == {
        "prompt", "text", "tokens", "prompt_tokens", "cached_tokens", "prompt_tps", "generation_tokens",
        "generation_tps", "first_token_s", "finish_reason", "stop_reason", "model", "sampling", "seed", "load_s",
        "compile_s", "tokens_before_compiled", "compiled_tps", "guessed", "guessed_right", "peak_memory",
        "gigabytes_per_s",
    }  # fmt: skip
    assert records[0]["generation_tokens"] == len(records[0]["tokens"]) == 3
    # generation_config.json of the demo asks for temperature 0.8 and top-p 0.95.
    assert (records[0]["sampling"]["temperature"], records[0]["sampling"]["top_p"]) == (0.8, 0.95)
    assert records[0]["sampling"]["top_k"] == 5


def test_stop_strings_and_the_models_own_end(capsys, fairytales):
    flags = [fairytales, "-p", "Once upon a time", "--greedy", "-n", 30, "--json", "-q"]
    free = json.loads(run(capsys, *flags)[1])
    word = free["text"].split()[4]
    stopped = json.loads(run(capsys, *flags, "--stop", "never there", "--stop", word)[1])
    assert stopped["text"] == free["text"][: free["text"].index(word)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", word)


def test_eos_can_be_ignored(capsys, chat_model, monkeypatch):
    seen = []

    def spy(*arguments, stop_ids, **options):
        seen.append(stop_ids)
        return complete(*arguments, stop_ids=stop_ids, **options)

    monkeypatch.setattr(generate, "complete", spy)
    run(capsys, chat_model, "-p", "Once", "-n", 1)
    run(capsys, chat_model, "-p", "Once", "-n", 1, "--ignore-eos")
    run(capsys, chat_model, "-p", "Once", "-n", 1, "--ignore-eos", "--extra-eos-token", "7")
    run(capsys, chat_model, "-p", "Once", "-n", 1, "--extra-eos-token", "</s>", "9", "--extra-eos-token", " a")
    assert len(seen[0]) == 1
    assert seen[1:3] == [frozenset(), {7}]
    tokenizer = Tokenizer(chat_model)
    assert seen[3] == seen[0] | {tokenizer.id_of("</s>"), 9, *tokenizer.encode(" a", False)}


def test_repository_code_is_asked_for_and_never_run(capsys, caplog, chat_model):
    flags = [chat_model, "-p", "Once", "-n", 1, "--trust-remote-code"]
    assert run(capsys, *flags)[0] == 0
    assert "miniawq never executes repository code" in caplog.text
    caplog.clear()
    assert run(capsys, *flags, "-q")[0] == 0
    assert not caplog.text


def test_a_chat_has_only_the_bos_that_its_template_writes(capsys, chat_model):
    tokenizer = Tokenizer(chat_model)
    for flags, prompt, bos in [
        ([], tokenizer.render_chat([{"role": "user", "content": "Hi"}]), 0),
        (["--raw"], "Hi", 1),
    ]:
        record = json.loads(run(capsys, chat_model, "-p", "Hi", "-n", 1, "--json", *flags)[1])
        assert record["prompt_tokens"] == len(tokenizer.encode(prompt, add_special_tokens=False)) + bos


def test_prompts_come_from_flags_files_and_stdin(capsys, monkeypatch, tmp_path, fairytales):
    (tmp_path / "prompt.txt").write_bytes(b"Once \\n upon\n")
    assert prompt_of(capsys, fairytales, "--file", tmp_path / "prompt.txt") == "Once \\n upon\n"
    assert prompt_of(capsys, fairytales, "-p", "") == ""
    typed = r"a\nb\t\\n \"c\" \d \\"
    assert prompt_of(capsys, fairytales, "-p", typed) == typed
    assert prompt_of(capsys, fairytales, "-e", "-p", typed) == 'a\nb\t\\n "c" \\d \\'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Há muito tempo".encode()), "utf-8"))
    assert prompt_of(capsys, fairytales, "-p", "-") == "Há muito tempo"


def test_a_chat_model_gets_its_template_unless_raw(capsys, tmp_path, chat_model):
    user = "<|im_start|>user\nHi<|im_end|>\n"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    assert prompt_of(capsys, chat_model, "-p", "Hi") == user + answer
    assert prompt_of(capsys, chat_model, "-p", "Hi", "--raw") == "Hi"
    assert prompt_of(capsys, chat_model, "-p", "Hi", "--system-prompt", "Be brief.") == system + user + answer
    prefix = ["--chat-template-kwargs", '{"prefix": "So"}']
    assert prompt_of(capsys, chat_model, "-p", "Hi", *prefix) == user + answer + "So"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    (tmp_path / "list.json").write_text(json.dumps(messages[:1]))
    assert prompt_of(capsys, chat_model, "--messages", tmp_path / "list.json") == user + answer
    (tmp_path / "object.json").write_text(json.dumps({"messages": messages[:1], "tools": [{"name": "spin"}]}))
    assert prompt_of(capsys, chat_model, "--messages", tmp_path / "object.json") == user + answer + "1 tools"


def test_a_template_that_is_given_takes_the_place_of_the_checkpoints(capsys, tmp_path, chat_model, fairytales):
    text = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    (tmp_path / "template.jinja").write_text(text)
    for template in (text, tmp_path / "template.jinja"):
        for model in (chat_model, fairytales):
            assert prompt_of(capsys, model, "-p", "Hi", "--chat-template", template) == "[Hi]"
    code, _, err = run(capsys, fairytales, "-p", "Hi", "--chat-template", tmp_path / "template")
    assert (code, "cannot read the text" in err) == (5, True)
    code, _, err = run(capsys, fairytales, "-p", "Hi", "--raw", "--chat-template", text)
    assert (code, "--raw goes with none of" in err) == (2, True)


def test_a_conversation_remembers_and_can_be_cleared(capsys, caplog, monkeypatch, chat_model):
    caplog.set_level(logging.INFO, logger="miniawq")
    lines = iter(["Hi", "", "/what", "And?", "/clear", "Again", "x" * 500, "/bye", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = run(capsys, chat_model, "-i", "-n", 3, "--greedy", "--show-prompt", "--system-prompt", "Be brief.")
    assert code == 0
    prompts = re.findall(r"<\|im_start\|>system.*?<\|im_start\|>assistant\n(?=\n)", err, re.DOTALL)
    assert len(prompts) == 4
    first_answer = out.split("\n")[0]
    assert prompts[1].count("<|im_start|>user") == 2
    assert f"assistant\n{first_answer}<|im_end|>" in prompts[1]
    assert prompts[2].count("<|im_start|>user") == 1
    assert err.count("/help lists the commands") == 1
    assert "there is no /what" in err
    assert err.count("begin again with this system message") == 1
    assert "the prompt does not fit into the context" in err
    assert "forgotten" not in caplog.text
    assert list(lines) == ["never read"]


def test_the_next_turn_computes_what_is_new(capsys, monkeypatch, chat_model):
    lines = iter(["Hi", "And?", "/bye"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = run(
        capsys, chat_model, "-i", "-n", 3, "--greedy", "--ignore-eos", "--stats", "--system-prompt", "So."
    )
    assert code == 0
    first, second = re.findall(r"Prompt: (\d+) tokens, (?:(\d+) of them kept, )?[\d.]+ tokens-per-sec", err)
    assert first[1] == ""
    assert int(first[0]) <= int(second[1]) < int(second[0])


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_leave_a_conversation(capsys, monkeypatch, chat_model, leave):
    def no_line(prompt):
        raise leave

    monkeypatch.setattr("builtins.input", no_line)
    assert run(capsys, chat_model, "-i")[:2] == (0, "")


def interrupted(monkeypatch, after):
    """Press Ctrl-C behind a number of tokens."""
    pushed = generate.Tokenizer.stream

    def stream(tokenizer, prompt_ids):
        made, count = pushed(tokenizer, prompt_ids), iter(range(after))
        push = made.push

        def counting(token_id):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return push(token_id)

        made.push = counting
        return made

    monkeypatch.setattr(generate.Tokenizer, "stream", stream)


def test_ctrl_c_stops_the_answer_and_not_the_conversation(capsys, monkeypatch, chat_model):
    lines = iter(["Hi", "Still there?", "/bye"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    interrupted(monkeypatch, after=3)
    code, out, err = run(capsys, chat_model, "-i", "-n", 9, "--ignore-eos", "--show-prompt", "--stats")
    assert code == 0
    assert err.count("[stopped]") == 2
    assert err.count("Generation: 4 tokens") == 2
    assert f"assistant\n{out.splitlines()[0]}<|im_end|>\n<|im_start|>user\nStill there?" in err


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_ctrl_c_prints_what_there_is_with_the_figures_so_far_and_exits_with_130(flag, capsys, monkeypatch, fairytales):
    three = run(capsys, fairytales, "-p", "Once", "-n", 3, "--greedy", "-q")[1]
    interrupted(monkeypatch, after=3)
    code, out, err = run(capsys, fairytales, "-p", "Once", "-n", 9, "--greedy", flag)
    assert (code, out) == (130, three)
    assert "Generation: 4 tokens" in err
    assert "interrupted" in err


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigint_ends_a_story_at_once():
    command = [sys.executable, "-u", "-m", "miniawq.generate"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Generation: " in err
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["-m", "here", "there", "-p", "x"], 2, "two models are given"),
        (
            ["-m", "100", "-p", "x"],
            2,
            "100 is no model\n  in other programs -m is the number of tokens\n  write -n 100",
        ),
        (["here"], 2, "there is no prompt\n  give --prompt, --file, --messages, --prompts or --interactive"),
        (["here", "-i", "--json"], 2, "--interactive goes with neither --json nor --num-samples"),
        (["here", "-i", "--raw"], 2, "--raw goes with none of"),
        (["here", "-p", "x", "--raw", "--system-prompt", "y"], 2, "--raw goes with none of"),
        (["--num-samples", "0"], 2, "--num-samples 0 makes no sense"),
        (["-p", "-", "-e"], 2, "--escape is for --prompt TEXT"),
        (
            ["--extra-eos-token", "king and"],
            1,
            "'king and' is no single token\n  the tokenizer makes 'king', 'Ġand' of",
        ),
        (["--extra-eos-token", "99999"], 1, "there is no token with the id 99999"),
        (["-n", "0"], 2, "--max-tokens 0 makes no sense\n  give 1 or more, or -1 for all"),
        (["--chat-template-kwargs", '{"messages": []}'], 2, "'messages' cannot be set"),
        (
            ["--max-seq-len", "513"],
            2,
            "--max-seq-len 513 is out of range\n  config.json: max_position_embeddings = 512",
        ),
        (["--max-seq-len", "-4"], 2, "--max-seq-len -4 is out of range"),
        (
            ["-i"],
            2,
            "this model cannot talk\n  it has no chat template: a base model\n  use --prompt, name a chat model",
        ),
        (["--device", "warp"], 2, "device 'warp' cannot be used"),
        (["--top-p", "1.5"], 1, "top_p = 1.5 makes no sense\n  it must be a number above 0 and at most 1"),
        (["-p", "x", "--system-prompt", "y"], 1, "this checkpoint has no chat template"),
        (["-p", "king " * 600], 1, "the prompt does not fit into the context\n  it has 602 tokens, 91 too many"),
        (["-p", "king", "--max-seq-len", "2"], 1, "prompt and answer together may have 2"),
        (["--file", "no/such/file"], 5, "cannot read the text no/such/file"),
        (["no/such/directory/", "-p", "x"], 5, "there is no directory no/such/directory/"),
    ],
)
def test_errors_say_what_why_and_what_to_do(capsys, flags, code, message):
    found, out, err = run(capsys, *flags)
    assert (found, out) == (code, "")
    assert err.startswith("miniawq generate: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-token", "3"], "unrecognized arguments: --max-token; did you mean --max-tokens?"),
        (["--temprature=1"], "did you mean --temperature?"),
        (["--greedy", "--temperature", "1"], "not allowed with argument"),
        (["--stats", "--quiet"], "not allowed with argument"),
        (["--chat-template-kwargs", "[1]"], "'[1]' is not a JSON object"),
        (["--dtype", "int4"], "invalid choice"),
        (["--max-tokens", "many"], "invalid int value"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_flags_that_cannot_be_parsed_are_usage_errors(capsys, flags, message):
    with pytest.raises(SystemExit) as left:
        main(flags)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the messages cannot be read"),
        (b'{"tools": []}', "KeyError: 'messages'"),
        (b'["hello"]', "the messages cannot be read"),
        (b"3", "the messages cannot be read"),
        (b"[]", "there are no messages"),
        (b"\xff\xfe", "messages.json is not text"),
    ],
)
def test_message_files_that_cannot_be_read_are_refused(capsys, tmp_path, chat_model, content, message):
    (tmp_path / "messages.json").write_bytes(content)
    code, out, err = run(capsys, chat_model, "--messages", tmp_path / "messages.json")
    assert (code, out) == (1, "")
    assert message in err


def test_the_context_shortens_an_answer_and_says_so(capsys, caplog, chat_model):
    with caplog.at_level(logging.INFO, logger="miniawq"):
        code, out, _ = run(capsys, chat_model, "-p", "Once", "--raw", "-n", 500, "--ignore-eos", "--json")
        record = json.loads(out)
        assert code == 0
        assert record["prompt_tokens"] + record["generation_tokens"] == 128
        assert record["finish_reason"] == "length"
        assert "new tokens fit after a prompt of" in caplog.text
        caplog.clear()
        every = json.loads(run(capsys, chat_model, "-p", "Once", "--raw", "-n", -1, "--ignore-eos", "--json")[1])
        assert every["generation_tokens"] == record["generation_tokens"]
        short = ["--max-seq-len", record["prompt_tokens"] + 3, "--ignore-eos", "--json", "--raw"]
        assert json.loads(run(capsys, chat_model, "-p", "Once", *short)[1])["generation_tokens"] == 3
        assert not caplog.text


def test_the_compiled_step_writes_the_same_text(capsys, monkeypatch, chat_model):
    made = []

    def step(*arguments, **options):
        made.append(DecodeStep(*arguments, **options, compiles=False))
        made[-1].build_seconds = 1e3
        return made[-1]

    monkeypatch.setattr("miniawq.engine.start.DecodeStep", step)
    monkeypatch.setattr("miniawq.engine.memory.SMALLEST_CACHE", 8)
    flags = [chat_model, "-p", "Once", "--raw", "-n", 9, "--temperature", 2, "--seed", 1, "--json"]
    plain = json.loads(run(capsys, *flags, "--no-compile")[1])
    assert not made
    quick = json.loads(run(capsys, *flags, "--compile")[1])
    assert quick["text"] == plain["text"]
    assert made[0].cache.max_seq_len == 16
    assert (plain["compile_s"], quick["compile_s"]) == (0, 1000)


def test_guesses_change_nothing_but_the_number_of_steps(capsys, caplog, monkeypatch, chat_model):
    def step(*arguments):
        return SpeculativeStep(*arguments, compiles=False)

    monkeypatch.setattr("miniawq.engine.start.SpeculativeStep", step)
    flags = [chat_model, "-p", "one two one two one two", "--raw", "-n", 40, "--ignore-eos", "--json"]
    plain = json.loads(run(capsys, *flags)[1])
    quick = json.loads(run(capsys, *flags, "--compile", "--speculate")[1])
    assert quick["text"] == plain["text"]
    assert 0 < quick["guessed_right"] <= quick["guessed"]
    told = run(capsys, *flags[:-1], "--compile", "--speculate", "--stats")[2]
    assert f"Guesses: {quick['guessed']} tokens, {quick['guessed_right']} right\n" in told
    assert not caplog.text
    assert json.loads(run(capsys, *flags, "--no-compile", "--speculate")[1])["text"] == plain["text"]
    assert "--speculate has no use" in caplog.text
    for others in (["--num-samples", 2], ["--logprobs", 1]):
        assert run(capsys, *flags, "--speculate", *others)[0] == 2


def lines_of_user(monkeypatch, *lines):
    typed = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))


def test_a_full_context_forgets_the_oldest_turns(capsys, caplog, monkeypatch, chat_model):
    """And never the system message; the answer has the room that it is to have."""
    lines_of_user(monkeypatch, *["What do you know of it?"] * 4, "/bye")
    flags = [chat_model, "-i", "-n", 9, "--ignore-eos", "--greedy", "--show-prompt", "--system-prompt", "So."]
    with caplog.at_level(logging.INFO, logger="miniawq"):
        code, _, err = run(capsys, *flags)
    assert code == 0
    assert caplog.text.count("the context is full: the oldest 4 messages are forgotten") == 1
    sent = re.findall(r"<\|im_start\|>system.*?<\|im_start\|>assistant\n(?=\n)", err, re.DOTALL)
    assert [prompt.count("<|im_start|>user") for prompt in sent] == [1, 2, 1, 2]
    assert all(prompt.startswith("<|im_start|>system\nSo.") for prompt in sent)
    assert "does not fit" not in err
    lines_of_user(monkeypatch, *["What do you know of it?"] * 4, "/bye")
    code, _, err = run(capsys, *flags, "--no-context-shift")
    assert code == 0
    assert "the prompt does not fit into the context" in err


def test_a_context_that_nobody_has_set_is_fitted_to_free_memory(capsys, caplog, monkeypatch, fairytales):
    checkpoint, dtype = open_checkpoint(fairytales), torch.float32
    free = footprint(checkpoint, dtype, device="cpu", max_seq_len=70).total
    monkeypatch.setattr("miniawq.engine.memory.device_memory", lambda _: DeviceMemory("cpu", 1 << 33, free))
    flags = [fairytales, "-p", "Once", "-n", -1, "--greedy", "--ignore-eos", "--json"]
    with caplog.at_level(logging.INFO, logger="miniawq"):
        code, out, _ = run(capsys, *flags)
    assert code == 0
    record = json.loads(out)
    assert record["prompt_tokens"] + record["generation_tokens"] == 64
    assert "the context has 64 tokens, as many as fit into free memory; the model's own has 512" in caplog.text
    code, _, err = run(capsys, *flags, "--max-seq-len", 300)
    assert code == 4
    assert "--max-seq-len 64 fits" in err
    code, _, err = run(capsys, fairytales, "-p", "king " * 300, "-n", 1)
    assert code == 1
    assert "too many: prompt and answer together may have 64, as many as fit into free memory" in err


def test_the_memory_margin_is_what_is_left_free(capsys, monkeypatch, fairytales):
    margin = 40 << 20
    free = footprint(open_checkpoint(fairytales), torch.float32, device="cpu", max_seq_len=70, overhead=margin).total
    monkeypatch.setattr("miniawq.engine.memory.device_memory", lambda _: DeviceMemory("cpu", 1 << 33, free))
    flags = [fairytales, "-p", "Once", "-n", -1, "--greedy", "--ignore-eos", "--json"]
    assert run(capsys, *flags)[0] == 4
    code, out, _ = run(capsys, *flags, "--memory-margin", "40MiB")
    record = json.loads(out)
    assert (code, record["prompt_tokens"] + record["generation_tokens"]) == (0, 64)
    code, _, err = run(capsys, *flags, "--memory-margin", "41MiB", "--max-seq-len", 64)
    assert code == 4
    assert "overhead 41.00 MiB" in err
    code, _, err = run(capsys, *flags, "--memory-margin", "1GiB")
    assert code == 4
    assert "give a smaller --memory-margin" in err


def test_a_kv_cache_in_8_bits_makes_room_for_four_times_as_many_tokens(capsys, monkeypatch, fairytales):
    found = []
    monkeypatch.setattr("miniawq.engine.start.KVCache", lambda *a, **b: found.append(KVCache(*a, **b)) or found[-1])
    flags = [fairytales, "-p", "Once", "-n", 20, "--greedy", "--no-compile"]
    texts = [run(capsys, *flags, "--kv-dtype", kind)[1] for kind in ("auto", "float32", "fp8")]
    assert texts[0] == texts[1]
    assert [cache.keys_NBMJE.dtype for cache in found] == [torch.float32, torch.float32, torch.float8_e4m3fn]
    assert all(len(text.split()) > 8 for text in texts)
    model, _ = load(fairytales, kv_dtype=torch.float8_e4m3fn)
    assert model.config.kv_cache_dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("share", "is_told"), [(1.05, True), (1.2, False)])
def test_the_plan_is_told_before_loading_where_memory_is_tight(share, is_told, capsys, caplog, monkeypatch, fairytales):
    needed = footprint(open_checkpoint(fairytales), torch.float32, device="cpu", max_seq_len=5).total
    memory = DeviceMemory("cpu", 1 << 33, int(share * needed))
    monkeypatch.setattr("miniawq.engine.memory.device_memory", lambda _: memory)
    with caplog.at_level(logging.INFO, logger="miniawq"):
        assert run(capsys, fairytales, "-p", "Once", "-n", 2, "--greedy")[0] == 0
    assert ("memory is tight: 0." in caplog.text) == is_told


def test_a_prompt_in_pieces_has_a_bar(chat_model):
    model, tokenizer = load(chat_model)
    seen = []

    def bar(pieces):
        for piece in pieces:
            seen.append(piece.shape[1])
            yield piece

    list(complete(model, tokenizer, [5] * 10, max_tokens=1, prefill_chunk=4, reading=bar))
    assert seen == [4, 4, 2]


def test_a_longer_conversation_gets_a_longer_cache(capsys, monkeypatch, chat_model):
    rooms = []

    def step(model, batch, room, sampling):
        rooms.append(room)
        return DecodeStep(model, batch, room, sampling, compiles=False)

    monkeypatch.setattr("miniawq.engine.start.DecodeStep", step)
    monkeypatch.setattr("miniawq.engine.memory.SMALLEST_CACHE", 8)
    lines = iter(["Hi", "And?", "/bye"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(capsys, chat_model, "-i", "-n", 3, "--compile")[0] == 0
    assert len(rooms) == 2
    assert rooms[0] < rooms[1] <= 128


@pytest.mark.parametrize("flags", [[], ["--no-memory-check"]])
def test_a_full_device_is_told_apart(flags, capsys, monkeypatch, fairytales):
    def load_model(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")

    monkeypatch.setattr(generate, "load_model", load_model)
    code, _, err = run(capsys, fairytales, "-p", "Once", *flags)
    assert code == 4
    assert "the memory of the device is full\n  CUDA out of memory. Tried to allocate 20.00 GiB.; planned 0." in err
    assert re.search(r" GiB, measured \d+\.\d\d [MG]iB\n  give a smaller --max-seq-len or --batch-size", err)


def test_what_cannot_fit_is_told_before_the_weights_are_read(capsys, monkeypatch, fairytales):
    small = DeviceMemory("cpu", 8 << 20, 4 << 20)
    with monkeypatch.context() as patch:
        patch.setattr("miniawq.engine.memory.device_memory", lambda _: small)
        patch.setattr(generate, "load_model", None)
        code, _, err = run(capsys, fairytales, "-p", "Once")
        assert code == 4
        assert "does not fit on cpu" in err
        assert "4.00 MiB of 8.00 MiB are free" in err
    monkeypatch.setattr("miniawq.engine.memory.device_memory", lambda _: small)
    assert run(capsys, fairytales, "-p", "Once", "-n", 2, "--no-memory-check")[0] == 0


@pytest.mark.parametrize(("words", "flags", "positions"), [
    (1, ["-n", 5], lambda prompt: prompt + 5),
    (300, ["-n", 3], lambda prompt: prompt + 3),
    (1, ["-n", -1], lambda prompt: 512),
    (1, ["-n", -1, "--max-seq-len", 99], lambda prompt: 99),
    (1, [], lambda prompt: 512),
    (1, ["-n", 3, "--compile"], lambda prompt: 512),
])  # fmt: skip
def test_the_plan_counts_prompt_and_answer_and_the_room_of_a_compiled_step(
    words, flags, positions, capsys, monkeypatch
):
    """All positions of the cache that will be made: with -1, a long prompt, and a step that rounds up."""
    prompt, seen = "king " * words, []

    def refuse(needed, *_):
        seen.append(needed.max_seq_len)
        raise DoesNotFit("seen")

    monkeypatch.setattr(generate, "require_memory", refuse)
    assert run(capsys, "-p", prompt, *flags)[0] == 4
    assert seen == [positions(len(Tokenizer(DEMO).encode(prompt)))]


@pytest.mark.parametrize(("layers", "threads"), [(1, 1), (30, 2)])
def test_a_small_model_runs_in_one_thread(layers, threads):
    model = tiny_checkpoints.dense_model(tiny_checkpoints.config_of(num_hidden_layers=layers, intermediate_size=768))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with hardware.threads(generate.threads_for(model)):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_load_takes_device_and_dtype_and_refuses_what_is_not_there(fairytales, device):
    model, tokenizer = load(fairytales, device=device, dtype=None)
    assert model.model.embed_tokens.weight.device.type == device.type
    assert tokenizer.eos_ids
    with pytest.raises(UsageError, match="device 'warp' cannot be used"):
        load(fairytales, device="warp")
    with pytest.raises(NotFound, match="no/such/directory"):
        load("./no/such/directory")
