"""Prompts through compiled and recorded functions: what the model itself computes, and every text by itself."""

import logging

import pytest
import torch

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.compiled.workshop import Workshop
from miniawq.engine import reader
from miniawq.engine.reader import UNCOMPILED, PromptReader, read
from miniawq.engine.sampling import Sampling
from miniawq.engine.start import PlainStep
from miniawq.generate import generate, load
from miniawq.model import KVCache
from tests.helpers import MODELS
from tests.helpers.golden_models import ONE_OF_EACH_FOLD

ROOM = 24
QUICK = ("llama", "phi3-long", "exaone4", "olmo2", "gemma3", "ministral3", "hunyuan", "mistral-window")


def tiny(name, device):
    return load_model(open_checkpoint(MODELS / name), device, torch.float32)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", [*QUICK, *(case for case in ONE_OF_EACH_FOLD if case.values[0] not in QUICK)])
@torch.no_grad()
def test_what_is_read_is_what_the_model_computes(name, is_padded, device):
    """Two pieces of two texts. The bound is that of the decode step."""
    model = tiny(name, device)
    tokens_BL = torch.randint(model.config.vocab_size, (2, 20), device=device)
    padding_B = torch.tensor([0, 3], device=device) if is_padded else None
    caches = [KVCache(model.config, 2, ROOM, device=device, padding_B=padding_B) for _ in range(2)]
    for piece_BL in tokens_BL.split(11, dim=1):
        found_BLD = read(model, UNCOMPILED, piece_BL, caches[0])
        expected_BLD = model.model(piece_BL, caches[1])
        torch.testing.assert_close(found_BLD, expected_BLD, rtol=0, atol=2e-5 * float(expected_BLD.abs().max()))
    assert caches[0].length == caches[1].length == 20
    torch.testing.assert_close(caches[0].keys_NBMJE, caches[1].keys_NBMJE)
    torch.testing.assert_close(caches[0].values_NBMJE, caches[1].values_NBMJE)


class ReplayedByHand:
    """A CUDA graph's stand-in: it keeps what is called under `recording`, and calls it again."""

    def pool(self):
        return "one memory"

    def replay(self):
        self.result.copy_(self.call())


class Recordings:
    """`torch.cuda.graph` and the function that runs under it. `made` counts what is recorded."""

    def __init__(self, monkeypatch):
        self.made, self.graph, through = 0, None, reader.through
        monkeypatch.setattr(torch.cuda, "CUDAGraph", ReplayedByHand)
        monkeypatch.setattr(torch.cuda, "graph", self.recording)
        monkeypatch.setattr(reader, "compiled_between", lambda config: UNCOMPILED)

        def noted(*given):
            result = through(*given)
            if self.graph is not None:
                self.graph.call, self.graph.result = lambda: through(*given), result
            return result

        monkeypatch.setattr(reader, "through", noted)

    def recording(self, graph, pool):
        assert pool in (None, "one memory")
        self.graph, self.made = graph, self.made + 1
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.graph = None


@pytest.fixture
def recordings(monkeypatch, device):
    """On a GPU the real ones."""
    return None if device.type == "cuda" else Recordings(monkeypatch)


def ready(model):
    made = PromptReader(model)
    made.is_ready = True
    return made


@pytest.mark.parametrize("name", ["llama", "phi3-long", "mistral-window"])
@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
@torch.inference_mode()
def test_beginnings_of_any_lengths_are_read_again_and_again(name, kv_dtype, recordings, device):
    model = load_model(open_checkpoint(MODELS / name).with_kv_cache(kv_dtype), device, torch.float32)
    read_prompt = ready(model)
    cache, expected = (KVCache(model.config, 2, 70, device=device) for _ in range(2))
    # Compiled, keys differ by a rounding, and may be kept as neighbouring numbers.
    error = 2e-5 if kv_dtype is None else 1e-2
    # Beyond its length a row holds what an earlier text left.
    for turn, length in enumerate((64, 3, 64, 63, 65, 2, 69, 66, 64)):
        tokens_BL = torch.randint(model.config.vocab_size, (2, length), device=device)
        cache.length = expected.length = 0
        found_BLD, expected_BLD = read_prompt(tokens_BL, cache), model.model(tokens_BL, expected)
        torch.testing.assert_close(found_BLD, expected_BLD, rtol=0, atol=error * float(expected_BLD.abs().max()))
        assert cache.length == length
        assert turn or not any(read_prompt.recordings.values())
        next_B = tokens_BL[:, :1]
        found_BLD, expected_BLD = read_prompt(next_B, cache), model.model(next_B, expected)
        torch.testing.assert_close(found_BLD, expected_BLD, rtol=0, atol=error * float(expected_BLD.abs().max()))
    assert [key[:2] for key in read_prompt.recordings] == [(2, 128), (2, 64)]
    assert recordings is None or recordings.made == 2


@torch.inference_mode()
def test_only_so_many_recordings_are_kept_and_the_last_used_stay(recordings, monkeypatch, device):
    model = tiny("llama", device)
    monkeypatch.setattr(reader, "MOST_RECORDINGS", 2)
    read_prompt = ready(model)
    kept = []
    for rows in (1, 1, 2, 2, 1, 3, 2):
        some = KVCache(model.config, rows, 64, device=device)
        read_prompt(torch.ones(rows, 5, dtype=torch.long, device=device), some)
        kept.append([key[0] for key in read_prompt.recordings])
    assert kept == [[1], [1], [1, 2], [1, 2], [2, 1], [1, 3], [3, 2]]


@pytest.mark.parametrize("why", ["not ready", "no room", "too long", "goes on", "padded", "one token"])
@torch.inference_mode()
def test_nothing_is_recorded(why, recordings, monkeypatch, device):
    model = tiny("llama", device)
    read_prompt = PromptReader(model) if why == "not ready" else ready(model)
    padding_B = torch.tensor([1, 0], device=device) if why == "padded" else None
    if why == "no room":
        monkeypatch.setattr(PromptReader, "_has_room", lambda *_: False)
    if why == "too long":
        monkeypatch.setattr(reader, "PREFILL_CHUNK", 127)
    tokens_BL = torch.arange(2 * (1 if why == "one token" else 5), device=device).view(2, -1)
    for _ in range(3):
        cache = KVCache(model.config, 2, ROOM, device=device, padding_B=padding_B)
        expected = KVCache(model.config, 2, ROOM, device=device, padding_B=padding_B)
        if why == "goes on":
            cache.length = expected.length = 2
        found_BLD, expected_BLD = read_prompt(tokens_BL, cache), model.model(tokens_BL, expected)
        torch.testing.assert_close(found_BLD, expected_BLD, rtol=0, atol=2e-5 * float(expected_BLD.abs().max()))
    assert not any(read_prompt.recordings.values())


@torch.inference_mode()
def test_a_whole_piece_is_read_by_compiled_functions_wherever_it_stands(recordings, monkeypatch, device):
    model, calls = tiny("llama", device), []
    monkeypatch.setattr(reader, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(reader, "read", lambda *given: calls.append(len(given[2][0])) or read(*given))
    read_prompt, cache = ready(model), KVCache(model.config, 1, ROOM, device=device)
    for length in (8, 8, 7):
        read_prompt(torch.ones(1, length, dtype=torch.long, device=device), cache)
    assert calls == [8, 8]
    assert cache.length == 23


def test_a_text_with_a_recorded_prompt_is_the_same(recordings, device):
    model, tokenizer = load(device=device, dtype=torch.float32)
    for prompt in ("Once upon a time", "The wolf", "There was a king", "Once upon a time"):
        tokens_BL = torch.tensor([tokenizer.encode(prompt)], device=device)
        step = PlainStep(model, 1, 40, Sampling())
        expected = [*generate(model, tokens_BL, max_tokens=12)]
        step.read = ready(model) if prompt == "Once upon a time" else step.read
        assert [*generate(model, tokens_BL, max_tokens=12, decoder=step)] == expected


@pytest.mark.compiles
@torch.inference_mode()
def test_compiled_functions_read_any_length_and_are_proven(device, monkeypatch):
    model = tiny("qwen3", device)
    read_prompt = PromptReader(model)
    read_prompt.compile()
    assert read_prompt.is_ready
    if device.type == "cpu":
        monkeypatch.setattr(PromptReader, "_has_room", lambda *_: False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, length in ((1, 2), (1, 17), (3, 5), (2, 8)):
            caches = [KVCache(model.config, rows, 64, device=device) for _ in range(2)]
            tokens_BL = torch.randint(model.config.vocab_size, (rows, length), device=device)
            found_BLD, expected_BLD = read_prompt(tokens_BL, caches[0]), model.model(tokens_BL, caches[1])
            torch.testing.assert_close(found_BLD, expected_BLD, rtol=0, atol=2e-5 * float(expected_BLD.abs().max()))


def test_what_is_wrong_is_left_out(monkeypatch, caplog, device):
    model = tiny("llama", device)
    wrong = UNCOMPILED._replace(gate=lambda activation, gate_TF, up_TF: gate_TF * up_TF)
    monkeypatch.setattr(reader, "compiled_between", lambda config: wrong)
    monkeypatch.setattr(reader, "WORKSHOP", Workshop())
    read_prompt = PromptReader(model)
    with caplog.at_level(logging.WARNING, "miniawq"):
        read_prompt.compile()
    assert not read_prompt.is_ready
    (record,) = caplog.records
    assert "'prompts' is left out" in record.getMessage()
    assert "hidden states differ by" in record.getMessage()
