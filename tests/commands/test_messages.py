"""What a person reads when a model is refused, and every exit code, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from miniawq.engine.batch import Batch
from miniawq.errors import DoesNotFit, InvalidInput, MiniawqError, NotFound, UnsupportedCheckpoint, UsageError
from miniawq.generate import main
from miniawq.hardware import DeviceMemory
from tests.checkpoint import test_refusals as refusals
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.chat_models import make_chat_model


class Refusal(NamedTuple):
    """A checkpoint that somebody may have, and words of each line that tells why it is not read."""

    make: Callable[[Path], object]
    what: str
    why: str
    fix: str


def config(**changes: object) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        tiny.make(directory)
        refusals.edit_config(directory, **changes)

    return make


def block(**changes: object) -> Callable[[Path], object]:
    return lambda directory: tiny.make(directory, block=tiny.AWQ_BLOCK | changes)


def tensors(kind: str) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        tiny.make(directory, block={})
        refusals.edit_tensors(directory, lambda found: found | refusals.FOREIGN[kind][0](found))

    return make


def files(*names: str) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(tiny.config_of()))
        for name in names:
            (directory / name).write_bytes(b"never read")

    return make


def without(name: str) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        tiny.make(directory)
        refusals.edit_tensors(directory, lambda found: {key: value for key, value in found.items() if key != name})

    return make


OTHER_UPLOAD = "look for an AutoAWQ (gemm) or compressed-tensors upload, or quantize the dense model"
NOT_HERE = "asks for something that is not implemented"
OTHER_ENGINE = "an engine that supports this one"
# The table of research on what people meet (in the order in which it lists them).
REFUSALS = {
    "experts": Refusal(config(num_experts=128), "is not implemented", "num_experts = 128", OTHER_ENGINE),
    "latent attention": Refusal(config(kv_lora_rank=512), "is not implemented", "kv_lora_rank = 512", OTHER_ENGINE),
    "linear attention": Refusal(
        config(layer_types=["linear_attention", "full_attention"]), "layers of this kind", "layer_types", OTHER_ENGINE
    ),
    "mamba": Refusal(config(mamba_d_state=16), "is not implemented", "mamba_d_state", OTHER_ENGINE),
    "pictures": Refusal(config(vision_config={"depth": 32}), "is not implemented", "vision_config", OTHER_ENGINE),
    "sound": Refusal(config(audio_config={"depth": 32}), "is not implemented", "audio_config", OTHER_ENGINE),
    "gemma": Refusal(
        config(architectures=["Gemma2ForCausalLM"], final_logit_softcapping=30.0),
        "Gemma2ForCausalLM is not implemented", "softcapping", OTHER_ENGINE,
    ),
    "before llama": Refusal(
        config(architectures=["GPT2LMHeadModel"]), NOT_HERE, "'GPT2LMHeadModel']; supported: Llama", OTHER_ENGINE
    ),
    "gemv_fast": Refusal(block(version="gemv_fast"), "GEMV_FAST", "version", OTHER_UPLOAD),
    "llm-awq": Refusal(tensors("llm-awq-v2"), "llm-awq", "scaled_zeros", OTHER_UPLOAD),
    "marlin": Refusal(block(version="marlin"), "Marlin", "version", OTHER_UPLOAD),
    "unknown layout": Refusal(tensors("no-known-layout"), "in no known layout", "scales", "miniawq quantize"),
    "gptq": Refusal(block(quant_method="gptq"), "GPTQ", "quant_method", OTHER_UPLOAD),
    "bitsandbytes": Refusal(block(quant_method="bitsandbytes"), "bitsandbytes", "quant_method", OTHER_UPLOAD),
    "fp8": Refusal(block(quant_method="fp8"), "FP8", "quant_method", OTHER_UPLOAD),
    "hqq": Refusal(block(quant_method="hqq"), "HQQ", "quant_method", OTHER_UPLOAD),
    "mlx": Refusal(
        config(quantization={"group_size": 64, "bits": 4}), "MLX", "config.json: quantization", OTHER_UPLOAD
    ),
    "openvino": Refusal(files("openvino_model.xml"), "OpenVINO", "openvino_model.xml", ""),
    "gguf": Refusal(files("model-Q4_K_M.gguf"), "GGUF", "model-Q4_K_M.gguf", ""),
    "quark": Refusal(tensors("quark"), "Quark", "q_proj.weight", OTHER_UPLOAD),
    "modelopt": Refusal(tensors("modelopt"), "ModelOpt", "pre_quant_scale", OTHER_UPLOAD),
    "three bits": Refusal(block(bits=3), "bits = 3", "quantization_config", "another upload"),
    "pickle": Refusal(files("pytorch_model.bin"), "pickle", "pickles can run code", OTHER_UPLOAD),
    "rope": Refusal(
        config(rope_scaling={"rope_type": "mrope", "factor": 4.0}),
        NOT_HERE, "rope_scaling.rope_type = 'mrope'", "ignoring it would give wrong text",
    ),
    "a missing tensor": Refusal(
        without("model.norm.weight"), "not those of the model", "missing", "the download may be incomplete"
    ),
    "unexpected tensors": Refusal(
        tensors("unexpected"), "not those of the model", "unexpected", "the download may be incomplete"
    ),
    "own code": Refusal(
        config(architectures=["RuQwen2ForCausalLM"], auto_map={"AutoModel": "m.M"}),
        NOT_HERE, "RuQwen2ForCausalLM", OTHER_ENGINE,
    ),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_says_what_why_and_what_to_do(kind, tmp_path, capsys):
    make, *words = REFUSALS[kind]
    make(tmp_path / "model")
    assert main([str(tmp_path / "model"), "-p", "x"]) == 3
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("miniawq generate: ")
    assert len(lines) in (2, 3)
    for line, word in zip([*lines, ""], words, strict=False):
        assert word in (line if len(lines) == 3 else err), err


@pytest.mark.thorough
@pytest.mark.parametrize(("kept", "names"), [("tokenizer.model", "SentencePiece"), ("tekken.json", "Tekken")])
def test_another_tokenizer_is_named_with_how_to_convert_it(kept, names, tmp_path, capsys):
    model = Path(make_chat_model(tmp_path))
    (model / "tokenizer.json").rename(model / kept)
    assert main([str(model), "-p", "x"]) == 3
    err = capsys.readouterr().err
    assert "no tokenizer.json in" in err
    assert names in err
    assert "AutoTokenizer.from_pretrained" in err


def test_every_class_of_error_has_the_exit_code_of_the_design():
    classes = (MiniawqError, InvalidInput, UsageError, UnsupportedCheckpoint, DoesNotFit, NotFound)
    assert [kind.exit_code for kind in classes] == [1, 1, 2, 3, 4, 5]


def nothing(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """As it is."""


def damage(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    refusals.edit_config(model, num_experts=4)


def fill_memory(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("miniawq.engine.memory.device_memory", lambda _: DeviceMemory("cpu", 8 << 20, 4 << 20))


def run_out(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("miniawq.generate.load_model", full)


def interrupt(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def pressed(_: Batch) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Batch, "_next_logits", pressed)


@pytest.mark.parametrize(("code", "prepare", "flags", "words"), [
    (0, nothing, [], ""),
    (1, nothing, ["-p", "x" * 500], "the prompt does not fit into the context"),
    (1, nothing, ["--top-p", "2"], "top_p = 2.0 makes no sense"),
    (2, nothing, ["--seed", "-1"], "--seed -1 makes no sense"),
    (2, nothing, ["--device", "warp"], "device 'warp' cannot be used"),
    (3, damage, [], "is not implemented"),
    (4, fill_memory, [], "this model does not fit on cpu"),
    (4, run_out, [], "the memory of the device is full"),
    (5, nothing, ["--file", "no/such/file"], "cannot read the text no/such/file"),
    (130, interrupt, ["--num-samples", "2"], "interrupted"),
])  # fmt: skip
def test_every_exit_code(code, prepare, flags, words, monkeypatch, tmp_path, capsys):
    model = make_chat_model(tmp_path)
    prepare(monkeypatch, Path(model))
    given = flags if "-p" in flags else [*flags, "-p", "x"]
    assert main([model, *given, "-n", "2", "-q"]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert (out == "") == (code != 0)
    assert (err == "") == (code == 0)
