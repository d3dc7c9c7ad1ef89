"""Perplexity and divergence, against the formulas written out."""

import json
import math
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import evaluate
from miniawq.commands.scores import Divergence, Predictor, Scores, cut_windows, score, token_scores, worst_tokens
from miniawq.errors import InvalidInput, UnsupportedCheckpoint, UsageError
from miniawq.hardware import DeviceMemory
from miniawq.model import KVCache
from miniawq.quantize.memory import hidden_states
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.tiny_checkpoints import SOME_THOROUGHLY, make, make_dense, make_with_its_own_head


def some_tokens(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(48, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", SOME_THOROUGHLY)
def test_the_streamed_perplexity_is_that_of_the_model(family: str, tmp_path: Path, device: torch.device) -> None:
    directory, model = make_dense(tmp_path / "dense", family)
    tokens_BL = some_tokens()
    scores = evaluate.evaluate(open_checkpoint(directory), tokens_BL, device=device)
    losses = cross_entropy(model(tokens_BL)[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())
    assert scores.perplexity == pytest.approx(math.exp(losses), rel=1e-4)
    assert scores.mean_loss == pytest.approx(float(losses), rel=1e-4)
    assert (scores.windows, scores.sequence_length, scores.tokens_scored) == (3, 11, 30)
    assert scores.reference is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_what_a_narrower_kv_cache_costs_is_what_the_model_with_one_loses(dtype: torch.dtype, tmp_path: Path) -> None:
    directory, _ = make_dense(tmp_path / "dense")
    checkpoint = open_checkpoint(directory).with_kv_cache(dtype)
    model, tokens_BL = load_model(checkpoint, dtype=torch.float32), some_tokens()
    logits_BLV = model(tokens_BL, KVCache(model.config, *tokens_BL.shape))
    losses = cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())
    scores = evaluate.evaluate(checkpoint, tokens_BL, open_checkpoint(directory))
    assert scores.reference is not None
    assert scores.reference.kl_mean > 1e-9
    assert scores.mean_loss == pytest.approx(float(losses), rel=1e-5)


def test_pieces_of_a_window_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, model = make_dense(tmp_path / "dense")
    whole = evaluate.perplexity(model, some_tokens())
    monkeypatch.setattr("miniawq.commands.scores.POSITIONS_PER_STEP", 3)
    assert evaluate.perplexity(model, some_tokens()).mean_loss == pytest.approx(whole.mean_loss)
    streamed = evaluate.evaluate(open_checkpoint(directory), some_tokens())
    assert streamed.mean_loss == pytest.approx(whole.mean_loss, rel=1e-5)


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_divergence_from_a_reference(layout: str, tmp_path: Path) -> None:
    reference, dense = make_dense(tmp_path / "dense")
    directory, _ = make(tmp_path / "int4", layout)
    tokens_BL = some_tokens()
    model = load_model(open_checkpoint(directory), dtype=torch.float32)
    scores = evaluate.evaluate(open_checkpoint(directory), tokens_BL, open_checkpoint(reference))
    ours_BLV, theirs_BLV = model(tokens_BL).log_softmax(-1), dense(tokens_BL).log_softmax(-1)
    kl_T = (theirs_BLV.exp() * (theirs_BLV - ours_BLV))[:, :-1].sum(-1).flatten()
    ours_T, theirs_T = (
        -logits_BLV[:, :-1].gather(-1, tokens_BL[:, 1:, None]).flatten() for logits_BLV in (ours_BLV, theirs_BLV)
    )
    found = scores.reference
    assert found is not None
    assert found.kl_mean == pytest.approx(float(kl_T.mean()), rel=1e-3)
    assert found.kl_95th_percentile == pytest.approx(float(kl_T.sort().values[27]), rel=1e-3)
    assert found.loss_difference == pytest.approx(float((ours_T - theirs_T).mean()), abs=1e-5)
    assert found.standard_error == pytest.approx(float((ours_T - theirs_T).std() / 30**0.5), rel=1e-3)
    assert found.kl_standard_error == pytest.approx(float(kl_T.std() / 30**0.5), rel=1e-3)
    agree_BL = (ours_BLV.argmax(-1) == theirs_BLV.argmax(-1))[:, :-1]
    assert found.top1_agreement == pytest.approx(float(agree_BL.float().mean()))
    in_memory = evaluate.perplexity(model, tokens_BL, dense).reference
    assert in_memory is not None
    assert asdict(in_memory) == pytest.approx(asdict(found), rel=1e-3, abs=1e-5)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    directory, _ = make_dense(tmp_path / "dense")
    checkpoint = open_checkpoint(directory)
    found = evaluate.evaluate(checkpoint, some_tokens(), checkpoint).reference
    assert found is not None
    assert (found.kl_mean, found.loss_difference, found.top1_agreement) == (0, 0, 1)


def test_a_head_that_differs_from_the_embedding_is_the_one_that_counts(tmp_path: Path, caplog) -> None:
    directory, model = make_with_its_own_head(tmp_path)
    losses = cross_entropy(model(some_tokens())[:, :-1].flatten(0, 1), some_tokens()[:, 1:].flatten())
    scores = evaluate.evaluate(open_checkpoint(directory), some_tokens())
    assert scores.mean_loss == pytest.approx(float(losses), rel=1e-4)
    assert "tie_word_embeddings" in caplog.text


def test_windows_do_not_overlap_and_some_are_spread_over_the_text() -> None:
    assert cut_windows(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows([7, 8, 9], 2048).tolist() == [[7, 8, 9]]
    assert cut_windows(list(range(22)), 4, 3)[:, 0].tolist() == [0, 8, 16]
    assert cut_windows(list(range(22)), 4, 9)[:, 0].tolist() == [0, 4, 8, 12, 16]
    for ids, length in (([], 4), ([1], 4), ([1, 2], 1)):
        with pytest.raises(InvalidInput, match="too short to score"):
            cut_windows(ids, length)


def test_the_command_line(fairytales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons. " * 9)
    command = [str(fairytales), "--text", str(tmp_path / "text.txt"), "--sequence-length", "32", "--device", "cpu"]
    assert evaluate.main([*command, "--reference", str(fairytales), "--max-windows", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["windows"] == 2
    assert scores["reference"]["kl_mean"] == 0
    assert 1 < scores["perplexity"] < 100
    assert evaluate.main(command) == 0
    assert capsys.readouterr().out.startswith("perplexity ")


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [
        ("--max-windows", "0", 1),
        ("--max-windows", "-2", 1),
        ("--sequence-length", "0", 2),
        ("--sequence-length", "1", 2),
    ],
)
def test_nothing_to_score_is_a_usage_error(flag, least, value, fairytales, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a king.")
    assert evaluate.main([str(fairytales), "--text", str(tmp_path / "text.txt"), flag, value]) == 2
    what, _, fix = capsys.readouterr().err.splitlines()
    assert f"{flag} {value} makes no sense" in what
    assert f"give {least} or more" in fix


@pytest.mark.parametrize("whose", ["model", "reference"])
def test_windows_longer_than_a_context_are_refused(whose, tmp_path) -> None:
    short, _ = tiny.make(tmp_path / "short", changes={"max_position_embeddings": 8})
    longer, _ = tiny.make(tmp_path / "longer")
    opened = [open_checkpoint(path) for path in ((short, longer) if whose == "model" else (longer, short))]
    assert evaluate.evaluate(opened[0], some_tokens(length=8), opened[1]).windows == 3
    with pytest.raises(UsageError, match="windows of 9 tokens are longer") as caught:
        evaluate.evaluate(opened[0], some_tokens(length=9), opened[1])
    assert "short/config.json: max_position_embeddings = 8" in str(caught.value)


def test_the_command_line_cuts_windows_of_the_context(fairytales, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons. " * 99)
    command = [str(fairytales), "--text", str(tmp_path / "text.txt"), "--device", "cpu", "--max-windows", "1"]
    assert evaluate.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sequence_length"] == 512
    assert evaluate.main([*command, "--sequence-length", "513"]) == 2
    assert "max_position_embeddings = 512" in capsys.readouterr().err


def test_predictions_that_are_no_numbers_are_an_error(tmp_path) -> None:
    directory, _ = tiny.make_dense(tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e37
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e37
    save_file(tensors, file)
    with pytest.raises(UnsupportedCheckpoint, match="predictions of the model are no numbers"):
        evaluate.evaluate(open_checkpoint(directory), some_tokens())


def test_a_loss_beyond_all_numbers_is_an_error() -> None:
    hidden_BLD = torch.zeros(1, 2, 4)
    predictor = Predictor(hidden_BLD, lambda hidden_TD: torch.tensor([[1000.0, 0.0]]))
    with pytest.raises(UnsupportedCheckpoint, match="no numbers"):
        score(torch.tensor([[0, 1]]), predictor)


def test_a_divergence_that_is_no_number_is_an_error() -> None:
    """No loss shows it: the token that the model excludes is not the next one."""
    tokens_BL, hidden_BLD = torch.tensor([[0, 1, 1]]), torch.zeros(1, 3, 4)
    ours = Predictor(hidden_BLD, lambda hidden_TD: torch.tensor([[-math.inf, 0.0]] * 2))
    theirs = Predictor(hidden_BLD, lambda hidden_TD: torch.zeros(2, 2))
    assert score(tokens_BL, ours).perplexity == 1
    with pytest.raises(UnsupportedCheckpoint, match="divergence is not finite"):
        score(tokens_BL, ours, theirs)


def test_one_predicted_token_is_not_compared() -> None:
    predictor = Predictor(torch.zeros(1, 2, 4), lambda hidden_TD: torch.zeros(1, 2))
    assert score(torch.tensor([[0, 1]]), predictor).perplexity == pytest.approx(2)
    with pytest.raises(InvalidInput, match="standard error"):
        score(torch.tensor([[0, 1]]), predictor, predictor)


def with_tokenizer(directory: Path, fairytales: Path, change=lambda tokenizer: tokenizer) -> str:
    """A copy of the demo model whose tokenizer.json is changed."""
    shutil.copytree(fairytales, directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return str(directory)


def other_ids(tokenizer: dict) -> dict:
    """The same tokens, two of which have changed their ids: as many ids, other ones."""
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġking"], vocabulary["Ġwas"] = vocabulary["Ġwas"], vocabulary["Ġking"]
    return tokenizer


def no_merges(tokenizer: dict) -> dict:
    tokenizer["model"]["merges"] = []
    return tokenizer


@pytest.mark.parametrize("change", [other_ids, no_merges])
def test_a_reference_with_another_tokenizer_is_refused(change, fairytales, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons.")
    command = [str(fairytales), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    assert evaluate.main([*command, "--reference", with_tokenizer(tmp_path / "same", fairytales)]) == 0
    capsys.readouterr()
    assert evaluate.main([*command, "--reference", with_tokenizer(tmp_path / "other", fairytales, change)]) == 2
    what, why, fix = capsys.readouterr().err.splitlines()
    assert "the reference has another tokenizer than the model" in what
    assert str(tmp_path / "other" / "tokenizer.json") in why
    assert "--reference" in fix


def test_a_reference_without_a_tokenizer_is_taken_on_trust(fairytales, tmp_path, caplog) -> None:
    reference = with_tokenizer(tmp_path / "reference", fairytales)
    (tmp_path / "reference" / "tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons.")
    assert evaluate.main([str(fairytales), "--text", str(tmp_path / "text.txt"), "--reference", reference]) == 0
    assert "reference has no tokenizer.json" in caplog.text


def test_scores_are_plain_numbers() -> None:
    scores = Scores(2.0, 0.7, 1, 4, 3, Divergence(2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    assert json.loads(json.dumps(asdict(scores)))["reference"]["top1_agreement"] == 1
    assert "+0.00000 +- 0.00000" in evaluate.describe_scores(scores)


def test_a_text_begins_with_one_bos(fairytales, tmp_path, capsys) -> None:
    """Also where the text writes it itself, as saved chats do."""
    words = "Once upon a time there was a king who had three sons. " * 3
    bare = Tokenizer(fairytales).encode(words, add_special_tokens=False)
    expected = evaluate.evaluate(open_checkpoint(fairytales), torch.tensor([[0, *bare]]))
    for text in (words, "<|endoftext|>" + words):
        (tmp_path / "text.txt").write_text(text)
        assert evaluate.main([str(fairytales), "--text", str(tmp_path / "text.txt"), "--device", "cpu", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["tokens_scored"] == len(bare)
        assert told["mean_loss"] == pytest.approx(expected.mean_loss)
        assert "BOS (0) at the start of the text" in told["protocol"]


def test_hidden_states_that_do_not_fit_are_kept_on_disk(tmp_path, monkeypatch) -> None:
    directory, _ = make_dense(tmp_path / "dense")
    checkpoint, used = open_checkpoint(directory), []
    within = evaluate.stream_predictor(checkpoint, some_tokens(), "cpu")
    monkeypatch.setattr(evaluate, "device_memory", lambda device: DeviceMemory("cpu", total=1, free=1))
    monkeypatch.setattr(evaluate, "hidden_states", lambda *where: used.append(where[2]) or hidden_states(*where))
    offloaded = evaluate.stream_predictor(checkpoint, some_tokens(), "cpu")
    assert used == [Path(tempfile.gettempdir())]
    assert torch.equal(offloaded.hidden_BLD, within.hidden_BLD)


class Letters:
    """A tokenizer of four letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcd"[token] for token in ids)


def test_the_worst_tokens_are_shown_where_they_stand() -> None:
    """The third prediction of the second window is another than the reference's, and less so the first of the first."""
    tokens_BL = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    hidden_BLD = torch.zeros(2, 4, 4)
    hidden_BLD[..., 0] = 1.0
    other_BLD = hidden_BLD.clone()
    other_BLD[1, 2] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    other_BLD[0, 0] = torch.tensor([1.0, 0.5, 0.0, 0.0])
    ours, theirs = (Predictor(states_BLD, lambda hidden_TD: hidden_TD) for states_BLD in (other_BLD, hidden_BLD))
    found = token_scores(tokens_BL, ours, theirs)
    assert found.kl_T is not None
    worst, second = worst_tokens(tokens_BL, found.kl_T, 2, ours, theirs, Letters())
    assert (worst.context, worst.next, worst.expected, worst.chosen) == ("dcb", "a", "a", "c")
    assert (second.context, second.next, second.expected, second.chosen) == ("a", "b", "a", "a")
    assert worst.kl == pytest.approx(float(found.kl_T.max()))
    assert worst.chosen_probability == pytest.approx(math.exp(3) / (3 + math.exp(3)))
    assert "at 'dcb': the reference expects 'a' (0.48), the model 'c' (0.87)" in evaluate.describe_worst(worst)


def test_the_command_line_shows_the_worst_tokens(fairytales, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons. ")
    command = [str(fairytales), "--text", str(tmp_path / "text.txt"), "--device", "cpu", "--worst", "2"]
    assert evaluate.main([*command, "--reference", str(fairytales)]) == 0
    assert capsys.readouterr().out.count("the reference expects") == 2
    assert evaluate.main(command) == 2
    assert "--worst needs a --reference" in capsys.readouterr().err
