"""`--prompts FILE`: what a line may be, what comes for it and in which order, and how an interrupted run goes on."""

import json
import logging
import os

import pytest
import torch

from miniawq.checkpoint import publishing
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands.records import OrderedRecords
from miniawq.engine.batch import Batch, Request
from miniawq.engine.memory import MOST_ROWS, OVERHEAD, fitting_rows, footprint
from miniawq.engine.rows import CompiledRows
from miniawq.errors import MiniawqError, UsageError
from miniawq.generate import main
from miniawq.hardware import DeviceMemory
from tests.helpers.chat_models import make_chat_model

PROMPTS = ["Once upon", "a king", "", "There was a wolf", "So", "He said"]
KEYS = {"id", "text", "prompt_tokens", "generation_tokens", "finish_reason", "stop_reason", "seed"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run(capsys, *flags):
    """Exit code, the records on stdout, and stderr."""
    code = main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def alone(capsys, model, *flags):
    code, (record,), _ = run(capsys, model, *flags, "--json", "-q")
    assert code == 0
    return record


def test_each_line_gets_the_record_of_its_prompt_in_the_order_of_the_file(capsys, caplog, chat_model, file):
    caplog.set_level(logging.INFO, "miniawq")
    flags = ["-n", 9, "--greedy"]
    code, records, _ = run(capsys, chat_model, "--prompts", file, *flags, "--batch-size", 2)
    assert code == 0
    assert [record["id"] for record in records] == [1, 2, 4, 5, 6]
    assert set(records[0]) == KEYS
    for record in records:
        expected = alone(capsys, chat_model, "-p", PROMPTS[record["id"] - 1], *flags)
        shared = {"text", "prompt_tokens", "generation_tokens", "finish_reason", "stop_reason"}
        assert {key: record[key] for key in shared} == {key: expected[key] for key in shared}
    assert "5 prompts, " in caplog.text
    assert "tokens-per-sec, 2 rows at once" in caplog.text
    assert "tokens are the same and were read once" in caplog.text


def test_a_compiled_step_has_a_power_of_two_of_rows_and_gives_the_same(capsys, monkeypatch, chat_model, file):
    made = []

    def uncompiled(model, count, room):
        made.append((count, room))
        return CompiledRows(model, count, room, compiles=False)

    monkeypatch.setattr("miniawq.commands.together.compiled_rows", uncompiled)
    flags = [chat_model, "--prompts", file, "-n", 5, "--greedy", "--seed", 1, "-q"]
    plain = run(capsys, *flags)
    assert run(capsys, *flags, "--compile") == plain
    longest = max(record["prompt_tokens"] for record in plain[1])
    assert made == [(4, longest + 5)], "the cache has what the longest of five prompts needs"


def test_json_lines_have_prompts_or_messages_and_names_of_their_own(capsys, chat_model, tmp_path):
    lines = [
        {"id": "first", "prompt": "Once", "reference": "ignored"},
        {"id": 7, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once"}]},
        {"messages": [{"role": "user", "content": "Once"}], "tools": [{"name": "spin"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, records, err = run(capsys, chat_model, "--prompts", path, "-n", 5, "--greedy", "-q")
    assert (code, err) == (0, "")
    assert [record["id"] for record in records] == ["first", 7, 3]
    assert records[0]["text"] == alone(capsys, chat_model, "-p", "Once", "-n", 5, "--greedy")["text"]
    expected = alone(capsys, chat_model, "-p", "Once", "--system-prompt", "Be brief.", "-n", 5, "--greedy")
    assert records[1]["text"] == expected["text"]
    (tmp_path / "messages.json").write_text(json.dumps(lines[2]))
    expected = alone(capsys, chat_model, "--messages", tmp_path / "messages.json", "-n", 5, "--greedy")
    assert records[2]["text"] == expected["text"]
    _, _, err = run(capsys, chat_model, "--prompts", path, "-n", 5, "--greedy", "-q", "--show-prompt")
    assert err.count("<|im_start|>user\nOnce<|im_end|>") == 3


def test_a_line_that_fails_is_told_and_the_others_are_answered(capsys, chat_model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "Once"}', "{broken", "[]", '{"id": 1.5, "prompt": "x"}', '{"prompt": 3}', '{"id": "none"}',
             '{"id": "long", "prompt": "' + "x" * 500 + '"}', '{"messages": [3]}', '{"prompt": "End"}']  # fmt: skip
    path.write_text("\n".join(lines))
    code, records, err = run(capsys, chat_model, "--prompts", path, "-n", 3, "-q")
    assert code == 1
    assert [record["id"] for record in records] == [1, 2, 3, 4, 5, "none", "long", 8, 9]
    assert [("error" in record) for record in records] == [False, *[True] * 7, False]
    assert "prompts.jsonl, line 2: JSONDecodeError" in records[1]["error"]
    assert 'write {"id": 1, "prompt": "..."}' in records[1]["error"]
    assert "does not fit into the context" in records[6]["error"]
    assert "there is no answer for 7 of 9 prompts\n  the first has the id 2: the prompt cannot be read" in err


def test_only_the_end_of_a_line_ends_it(capsys, chat_model, tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(json.dumps({"prompt": "a\u2028b\x0bc"}, ensure_ascii=False).encode() + b"\r\n")
    code, records, _ = run(capsys, chat_model, "--prompts", path, "-n", 2, "-q")
    assert (code, len(records)) == (0, 1)
    path.write_bytes("a\u2028b\r\nc\r\n".encode())
    _, records, err = run(capsys, chat_model, "--prompts", path, "-n", 2, "-q", "--show-prompt")
    assert len(records) == 2
    assert "user\nc<|im_end|>" in err


def test_a_base_model_continues_each_line(capsys, fairytales, file):
    code, records, _ = run(capsys, fairytales, "--prompts", file, "-n", 4, "--greedy", "-q")
    assert code == 0
    assert records[0]["text"] == alone(capsys, fairytales, "-p", PROMPTS[0], "-n", 4, "--greedy")["text"]


def test_an_interrupted_run_goes_on_where_it_was(capsys, chat_model, file, tmp_path):
    """Cut anywhere: in the middle of a line, between two, before the first."""
    flags = [chat_model, "--prompts", file, "-n", 6, "--temperature", 2, "-q"]
    whole = tmp_path / "whole.jsonl"
    assert run(capsys, *flags, "--output", whole, "--seed", 5)[0] == 0
    content = whole.read_bytes()
    seeds = [json.loads(line)["seed"] for line in content.splitlines()]
    assert seeds == [5, 6, 7, 8, 9]
    first = content.index(b"\n") + 1
    long = content[:first] + b'{"id": 2, "text": "' + b"x" * 10_000
    for left in (long, *(content[:cut] for cut in (first, first + 10, len(content) - 1, len(content)))):
        part = tmp_path / "part.jsonl"
        part.write_bytes(left)
        assert run(capsys, *flags, "--output", part, "--resume")[:2] == (0, [])  # with the seeds of the first run
        assert part.read_bytes() == content
    part.write_bytes(content[:3])
    assert run(capsys, *flags, "--output", part, "--resume", "--seed", 5)[0] == 0
    assert part.read_bytes() == content


def test_what_was_written_before_ctrl_c_is_kept(capsys, caplog, monkeypatch, chat_model, file, tmp_path):
    out = tmp_path / "out.jsonl"
    next_logits, count = Batch._next_logits, iter(range(4))

    def interrupted(batch):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return next_logits(batch)

    monkeypatch.setattr(Batch, "_next_logits", interrupted)
    flags = [chat_model, "--prompts", file, "-n", 3, "--greedy", "--ignore-eos", "--output", out, "--batch-size", 1]
    with caplog.at_level(logging.INFO, "miniawq"):
        assert run(capsys, *flags)[0] == 130
    assert "2 of 5 are answered; --resume goes on" in caplog.text
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [1, 2]
    monkeypatch.setattr(Batch, "_next_logits", next_logits)
    assert run(capsys, *flags, "--resume")[0] == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [1, 2, 4, 5, 6]


def test_what_has_come_before_its_turn_is_kept_too(capsys, monkeypatch, chat_model, tmp_path):
    """The first prompt goes on while all others end; then the run is killed, in the middle of a line."""
    file, out, whole = (tmp_path / name for name in ("prompts.txt", "out.jsonl", "whole.jsonl"))
    file.write_text("\n".join(["Once upon a time"] * 6))
    flags = [chat_model, "--prompts", file, "-n", 4, "--temperature", 3, "--seed", 3, "--batch-size", 2, "-q"]
    assert run(capsys, *flags, "--output", whole)[0] == 0
    lines = whole.read_text().splitlines(keepends=True)
    ahead = [json.dumps({"number": number, "record": json.loads(lines[number])}) + "\n" for number in (2, 4, 3)]
    others = ['{"number": 5, "record": {"id": 9, "seed": 1}}\n', "text\n", '{"number": 77, "record": {}}\n']
    out.write_text(lines[0])
    aside = tmp_path / "out.jsonl.ahead"
    aside.write_text("".join([*ahead, *others]) + ahead[0][:9])
    asked = []
    monkeypatch.setattr("miniawq.commands.many.Request", lambda *fields: asked.append(fields[2]) or Request(*fields))
    assert run(capsys, *flags, "--output", out, "--resume")[0] == 0
    assert asked == [4, 8], "the second and the last"
    assert out.read_bytes() == whole.read_bytes()
    assert not aside.exists()


def test_what_waits_for_its_turn_lies_beside_the_file(tmp_path):
    out, aside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ahead"
    records = [{"id": name, "seed": 1} for name in "abc"]
    with OrderedRecords(out, False, ["a", "b", "c"]) as first:
        first.put(2, records[2])
        assert not out.read_text()
    with OrderedRecords(out, True, ["a", "b", "c"]) as again:
        assert again.ahead == {2: records[2]}
        for number in (0, 1):
            again.put(number, records[number])
        assert again.written == 3
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert not aside.exists()
    aside.write_text("of another run\n")
    out.unlink()
    with OrderedRecords(out, False, ["a"]):
        assert not aside.exists()


def test_one_run_writes_to_a_file(tmp_path, capsys, chat_model, file):
    out = tmp_path / "out.jsonl"
    flags = [chat_model, "--prompts", file, "-n", 1, "--output", out]
    with publishing.alone(out):
        code, _, err = run(capsys, *flags)
    assert (code, out.read_text()) == (2, "")
    assert "another run is writing to" in err
    late = OrderedRecords(out, False, [1])
    assert run(capsys, *flags, "-q")[0] == 0
    whole = out.read_bytes()
    with pytest.raises(UsageError, match="another run has written"), late:
        pass
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_an_output_that_cannot_be_is_refused_before_the_weights_are_read(
    capsys, chat_model, file, tmp_path, monkeypatch
):
    monkeypatch.setattr("miniawq.generate.load_model", lambda *_: pytest.fail("the model was loaded"))
    for output in (tmp_path, tmp_path / "none" / "out.jsonl"):
        code, _, err = run(capsys, chat_model, "--prompts", file, "--output", output)
        assert code == 1
        assert f"cannot write to {output}" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk is always full here")
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    """Also when the file is closed, which writes once more."""
    records = OrderedRecords(tmp_path / "out.jsonl", False, ["a"])
    records.__enter__()
    records._file.close()
    records._file = open("/dev/full", "w")  # noqa: SIM115
    for written in (lambda: records.put(0, {"id": "a"}), lambda: records.__exit__(None, None, None)):
        with pytest.raises(MiniawqError, match=r"the disk is full while writing to .*out\.jsonl"):
            written()


def test_a_run_that_is_done_says_so(tmp_path, capsys, caplog, chat_model, file):
    caplog.set_level(logging.INFO, "miniawq")
    flags = [chat_model, "--prompts", file, "-n", 1, "--output", tmp_path / "out.jsonl"]
    assert run(capsys, *flags)[0] == 0
    caplog.clear()
    assert run(capsys, *flags, "--resume")[0] == 0
    assert "all 5 prompts were answered before" in caplog.text
    assert "tokens-per-sec" not in caplog.text


def test_records_are_written_in_order_as_soon_as_they_can_be(capsys):
    with OrderedRecords(None, False, ["a", "b", "c"]) as records:
        for number, seen in ((1, ""), (0, "01"), (2, "2")):
            records.put(number, {"id": number})
            assert "".join(str(json.loads(line)["id"]) for line in capsys.readouterr().out.splitlines()) == seen
    assert records.written == 3


OURS = b'{"id": 1, "seed": 5}\n'
OTHERS = [
    b'{"id": 2, "seed": 5}\n',
    OURS + b'{"id": 4, "seed": 6}\n',
    b"text\n",
    b"[1]\n",
    OURS * 2,
    OURS + b'{"id": 2, "seed": 6}\n' * 2,
    b'{"id": 1}\n',
]


@pytest.mark.parametrize("content", OTHERS)
def test_a_file_of_another_run_is_left_alone(content, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="the output is that of other prompts"):
        OrderedRecords(path, True, [1, 2])
    with pytest.raises(UsageError, match="the output is there already"):
        OrderedRecords(path, False, [1, 2])
    assert path.read_bytes() == content


@pytest.mark.parametrize(("flags", "message"), [
    (["--resume"], "--batch-size, --output and --resume are for --prompts"),
    (["--prompts", "f", "--resume"], "--resume needs --output FILE"),
    (["--prompts", "f", "--batch-size", "0"], "--batch-size 0 makes no sense"),
    (["--prompts", "f", "--num-samples", "2"], "--prompts does not go with --num-samples"),
])  # fmt: skip
def test_flags_that_do_not_go_together(capsys, flags, message):
    code, _, err = run(capsys, *flags)
    assert code == 2
    assert message in err


def test_a_file_without_prompts(capsys, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    code, _, err = run(capsys, "--prompts", tmp_path / "empty")
    assert code == 1
    assert "has no prompts" in err


def test_as_many_rows_as_memory_allows(monkeypatch):
    checkpoint = open_checkpoint(None)

    def rows(free, most=100, **margin):
        monkeypatch.setattr("miniawq.engine.memory.device_memory", lambda _: DeviceMemory("cpu", free, free))
        return fitting_rows(checkpoint, "cpu", torch.float32, most=most, max_seq_len=256, **margin)

    need = {
        count: footprint(checkpoint, torch.float32, device="cpu", batch=count, max_seq_len=256).total
        for count in (1, 7)
    }
    assert rows(need[7]) == 7
    assert rows(need[7] - 1) == 6
    assert rows(need[7], most=3) == 3
    assert rows(need[7] - 9, overhead=OVERHEAD["cpu"] - 9) == 7
    assert rows(need[1]) == rows(0) == 1
    assert rows(1 << 50) == MOST_ROWS["cpu"]


def test_the_memory_margin_is_left_free_by_all_rows(capsys, monkeypatch, file):
    margins = []

    def noted(*_, overhead, **__):
        margins.append(overhead)
        return 2

    monkeypatch.setattr("miniawq.commands.together.fitting_rows", noted)
    assert run(capsys, "--prompts", file, "-n", 2, "-q", "--memory-margin", "3MiB")[0] == 0
    assert margins == [3 << 20]
