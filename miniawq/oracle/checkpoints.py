"""L4, checkpoints: what a reader must give for a valid directory, and which directories it must refuse.

Every value is compared bit for bit, and every tensor must be there, under its Hugging Face name. A refusal is any
exception whose message holds one of the words of the case: a reader that fails on everything refuses nothing. Layouts
that a reader may leave out (`acceptable`) must be refused or read right.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import miniawq.oracle.cases as cases
from miniawq.oracle.check import Check, rule
from miniawq.oracle.directories import (
    ATTENTION,
    AWQ_BLOCK,
    INDEX,
    LINEARS,
    VOCABULARY,
    WEIGHTS,
    Model,
    compressed,
    compressed_block,
    compressed_symmetric,
    gemm,
    gemv,
    gptq,
    in_two_shards,
    model,
)
from miniawq.oracle.subject import Broken, Crash, Subject, expect_equal, expect_tensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q, K_PROJ = f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj"
Kind = Literal["valid", "acceptable", "invalid"]


@dataclass(frozen=True)
class Case:
    """One directory: how it is made, what it shows, and for one to be refused the words a message may use."""

    id: str
    kind: Kind
    comment: str
    make: Callable[[], Model]
    words: tuple[str, ...] = ()
    damage: Callable[[Path], object] | None = None

    def write(self, directory: Path) -> Model:
        """Write the directory and return what it was made of."""
        made = self.make()
        made.write(directory)
        if self.damage:
            self.damage(directory)
        return made


def changed(edit: Callable[[Model], object], start: Callable[[], Model] = model) -> Callable[[], Model]:
    """A model with one edit."""

    def make() -> Model:
        made = start()
        edit(made)
        return made

    return make


def with_block(start: Callable[[], Model] = model, **keys: object) -> Callable[[], Model]:
    """A model with other keys in its quantization block; None removes one."""

    def edit(made: Model) -> None:
        merged = made.config["quantization_config"] | keys
        made.config["quantization_config"] = {key: value for key, value in merged.items() if value is not None}

    return changed(edit, start)


def tied(made: Model, copy: bool) -> None:
    """The head is the embedding, left out of the file or stored once more."""
    made.config["tie_word_embeddings"] = True
    made.expected[HEAD] = made.expected[EMBEDDING]
    if copy:
        made.tensors[HEAD] = made.tensors[EMBEDDING].clone()
    else:
        del made.tensors[HEAD], made.expected[HEAD]


def tied_to_another(made: Model) -> None:
    """tie_word_embeddings, and a head in the file that is not the embedding."""
    made.config["tie_word_embeddings"] = True


def biased(made: Model) -> None:
    """Qwen2: biases on q, k and v, and no key that says so."""
    made.config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    for name in LINEARS[:3]:
        bias = (torch.arange(made.layers[name].codes.shape[1]) % 7 - 3).to(torch.float16) / 8
        made.tensors[f"{name}.bias"] = made.expected[f"{name}.bias"] = bias


def qwen3() -> Model:
    """Qwen3: heads wider than hidden_size / heads, and norms of queries and keys."""
    made = model(head=64)
    made.config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
    for name, first in (("q_norm", 0.5), ("k_norm", 1.0)):
        made.tensors[f"{ATTENTION}.{name}.weight"] = torch.linspace(first, 1.5, 64).half()
        made.expected[f"{ATTENTION}.{name}.weight"] = made.tensors[f"{ATTENTION}.{name}.weight"]
    return made


def old_quant_config(made: Model) -> None:
    """AutoAWQ up to 0.1.6: a file of its own, other names, capitals, and nothing in config.json."""
    del made.config["quantization_config"]
    made.texts["quant_config.json"] = json.dumps(
        {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    )


def synonyms(made: Model) -> None:
    """The old names in the new place."""
    made.config["quantization_config"] = {
        "quant_method": "AWQ", "zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM",
    }  # fmt: skip


def rope_parameters(made: Model) -> None:
    """transformers 5: rope_parameters instead of rope_theta, dtype instead of torch_dtype."""
    made.config["rope_parameters"] = {"rope_theta": made.config.pop("rope_theta"), "rope_type": "default"}
    made.config["dtype"] = made.config.pop("torch_dtype")


def mixed_dtypes(made: Model) -> None:
    """Norms and embeddings in bfloat16 beside float16 scales."""
    for name in (EMBEDDING, HEAD, "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        made.tensors[name] = made.expected[name] = made.tensors[name].to(torch.bfloat16)


def packed_head(made: Model) -> None:
    """lm_head quantized like the other linear layers."""
    layer = cases.random_layer(99, made.config["hidden_size"], VOCABULARY, 32)
    del made.tensors[HEAD]
    made.tensors |= {f"lm_head.{part}": tensor for part, tensor in gemm(layer).items()}
    made.expected[HEAD] = layer.weight.t().to(torch.float16).contiguous()


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Model], None]:
    """An edit of one tensor."""

    def edit(made: Model) -> None:
        made.tensors[name] = change(made.tensors[name])

    return edit


def without(*names: str) -> Callable[[Model], None]:
    """An edit that drops tensors."""

    def edit(made: Model) -> None:
        for name in [name for name in made.tensors if name.startswith(names)]:
            del made.tensors[name]

    return edit


def cut_short(directory: Path) -> None:
    """The file loses its last third."""
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) * 2 // 3])


def lfs_pointer(directory: Path, file: str = WEIGHTS) -> None:
    """git without git-lfs leaves this instead of the weights."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4120334\n"
    (directory / file).write_text(text)


def pickle_only(directory: Path) -> None:
    """Only a file that cannot be read without running code from it."""
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Another index."""
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def sharded() -> Model:
    """Two shards."""
    return in_two_shards(model())


def asymmetric() -> Model:
    """compressed-tensors with zeros."""
    return model(compressed, compressed_block())


def channelwise() -> Model:
    """compressed-tensors with one scale for each output channel."""
    return model(compressed, compressed_block(strategy="channel", group_size=None), group_size=-1)


def symmetric() -> Model:
    """compressed-tensors without zeros."""
    return model(compressed_symmetric, compressed_block(symmetric=True), symmetric=True)


def valid(id: str, comment: str, make: Callable[[], Model], damage: Callable[[Path], object] | None = None) -> Case:
    """A directory that every reader must take."""
    return Case(id, "valid", comment, make, damage=damage)


def either(id: str, comment: str, make: Callable[[], Model], damage: Callable[[Path], object] | None = None) -> Case:
    """A directory that a reader may refuse, but must not read wrongly."""
    return Case(id, "acceptable", comment, make, damage=damage)


def invalid(
    id: str, comment: str, words: str, make: Callable[[], Model] = model, damage: Callable[[Path], object] | None = None
) -> Case:
    """A directory to refuse; `words` are separated by spaces."""
    return Case(id, "invalid", comment, make, tuple(words.split()), damage)


CASES = [
    valid("gemm", "AutoAWQ GEMM as AutoAWQ writes it", model),
    valid("gemm-sharded", "two shards and an index", sharded),
    valid("stale-shard", "a file the index does not name is ignored", sharded,
          lambda d: (d / "model-00003-of-00003.safetensors").write_bytes(b"old")),
    valid("pickle-beside", "pytorch_model.bin beside safetensors is left alone", model,
          lambda d: (d / "pytorch_model.bin").write_bytes(b"not even a pickle")),
    valid("tied", "tie_word_embeddings and no lm_head in the file", changed(lambda m: tied(m, copy=False))),
    valid("tied-copy", "tie_word_embeddings and an equal copy of the head", changed(lambda m: tied(m, copy=True))),
    either("tied-to-another", "tie_word_embeddings, and another head in the file", changed(tied_to_another)),
    valid("quant-config-file", "only quant_config.json, as AutoAWQ wrote it up to 0.1.6", changed(old_quant_config)),
    valid("synonyms", "w_bit, q_group_size and capitals in config.json", changed(synonyms)),
    valid("group-64", "groups of 64", lambda: model(hidden=128, head=64, group_size=64)),
    valid("group-128", "groups of 128", lambda: model(hidden=128, head=64, group_size=128)),
    valid("group-all", "group_size -1: one group of all inputs", lambda: model(group_size=-1)),
    valid("bias", "Qwen2: biases beside packed weights", changed(biased)),
    valid("head-dim", "Qwen3: head_dim is not hidden_size / heads, and q_norm, k_norm", qwen3),
    valid("partly-dense", "modules_to_not_convert leaves a linear layer dense", lambda: model(dense=(LINEARS[3],))),
    valid("mixed-dtypes", "bfloat16 norms and embeddings, float16 scales", changed(mixed_dtypes)),
    valid("rope-parameters", "the config keys of transformers 5", changed(rope_parameters)),
    valid("dense", "no quantization at all", lambda: model(block={}, dense=tuple(LINEARS))),
    valid("compressed-asymmetric", "compressed-tensors with packed zeros", asymmetric),
    valid("compressed-symmetric", "compressed-tensors without zeros: they are 8", symmetric),
    valid("compressed-bfloat16", "compressed-tensors with bfloat16 scales",
          lambda: model(compressed, compressed_block(), scale_dtype=torch.bfloat16)),
    either("compressed-channel", "compressed-tensors with one group of all inputs", channelwise),
    either("compressed-zeros-unexpected", "the config says symmetric, but zeros are stored, and not 8",
           lambda: model(compressed, compressed_block(symmetric=True))),
    valid("transformers-keys", "the keys transformers 4 adds to the block", with_block(
        backend="autoawq", do_fuse=False, exllama_config={}, fuse_max_seq_len=0, modules_to_fuse={})),
    either("zero-point-false", "auto-round: zero_point false, and qzeros that are all 8",
           with_block(lambda: model(symmetric=True), zero_point=False)),
    either("zero-point-absent", "zero_point false and no qzeros: zeros are 8", changed(
        lambda m: [m.tensors.pop(name) for name in list(m.tensors) if name.endswith("qzeros")],
        with_block(lambda: model(symmetric=True), zero_point=False))),
    either("file-name", "one file under AutoAWQ's old name", model,
           lambda d: (d / WEIGHTS).rename(d / "awq_model_w4_g128.safetensors")),
    either("head-packed", "the head is packed too", changed(packed_head)),
    either("gemv", "AutoAWQ GEMV, named so", lambda: model(gemv, AWQ_BLOCK | {"version": "gemv"})),
    invalid("group-size-mismatch", "config.json says 64, the scales say 32", "group", with_block(group_size=64)),
    invalid("gemv-called-gemm", "GEMV tensors under version gemm", "gemv layout shape qweight qzeros version",
            lambda: model(gemv, AWQ_BLOCK)),
    invalid("gptq", "GPTQ, named so", "gptq", lambda: model(gptq, AWQ_BLOCK | {"quant_method": "gptq"})),
    invalid("gptq-called-awq", "GPTQ tensors under quant_method awq", "gptq g_idx layout shape qweight",
            lambda: model(gptq, AWQ_BLOCK)),
    invalid("bits-3", "three bits", "bit", with_block(bits=3)),
    invalid("bits-8", "eight bits, under the old name", "bit", with_block(bits=None, w_bit=8)),
    invalid("version-gemv-fast", "another layout by name", "gemv_fast gemvfast version",
            with_block(version="gemv_fast")),
    invalid("version-marlin", "another layout by name", "marlin version", with_block(version="marlin")),
    invalid("method-unknown", "a method nobody knows", "quant_method method squeeze",
            with_block(quant_method="squeeze")),
    invalid("qzeros-missing", "zero_point true, but a layer has no qzeros", "qzeros q_proj",
            changed(without(f"{Q}.qzeros"))),
    invalid("scales-missing", "a layer has no scales", "scales q_proj", changed(without(f"{Q}.scales"))),
    invalid("linear-missing", "a linear layer is not there at all", "k_proj", changed(without(f"{K_PROJ}."))),
    invalid("norm-missing", "a norm is not there", "norm", changed(without("model.norm.weight"))),
    invalid("head-missing", "no lm_head, and not tied", "lm_head tie", changed(without(HEAD))),
    invalid("scales-short", "scales of one group fewer than the zeros", "scales group shape q_proj",
            changed(replace(f"{Q}.scales", lambda t: t[:-1]))),
    invalid("columns-short", "fewer output channels than the config says", "shape q_proj qweight qzeros scales",
            changed(replace(f"{Q}.qweight", lambda t: t[:, :-1]))),
    invalid("embedding-transposed", "a dense tensor of the wrong shape", "embed_tokens shape",
            changed(replace(EMBEDDING, lambda t: t.t().reshape(-1, VOCABULARY)))),
    invalid("qweight-int64", "words of 64 bits", "qweight dtype int64 i64",
            changed(replace(f"{Q}.qweight", lambda t: t.to(torch.int64)))),
    invalid("compressed-actorder", "permuted inputs", "actorder g_idx", lambda: model(
        lambda layer: compressed(layer) | {"weight_g_idx": torch.arange(layer.codes.shape[0], dtype=torch.int32) % 2},
        compressed_block(actorder="group"))),
    invalid("compressed-bits-8", "eight bits", "bit", lambda: model(compressed, compressed_block(num_bits=8))),
    invalid("compressed-zeros-missing", "asymmetric, but without zeros", "zero_point symmetric",
            lambda: model(compressed_symmetric, compressed_block())),
    invalid("compressed-shape", "weight_shape does not match the words", "weight_shape shape",
            changed(replace(f"{Q}.weight_shape", lambda t: t.flip(0) * 2), asymmetric)),
    invalid("compressed-marlin-24", "a sparse format", "format marlin", with_block(asymmetric, format="marlin-24")),
    invalid("shard-missing", "the index names a file that is not there", "00002", sharded,
            lambda d: (d / "model-00002-of-00002.safetensors").unlink()),
    invalid("index-wrong", "the index puts a tensor into the wrong file", f"norm {INDEX} index", sharded,
            lambda d: edit_index(d, lambda m: m.update({"model.norm.weight": "model-00001-of-00002.safetensors",
                                                         LINEARS[0] + ".extra": "model-00001-of-00002.safetensors"}))),
    invalid("index-outside", "the index points out of the directory", "outside path .. name", sharded,
            lambda d: edit_index(d, lambda m: m.update({EMBEDDING: "../elsewhere.safetensors"}))),
    invalid("truncated", "a download that stopped", f"{WEIGHTS} truncated incomplete", model, cut_short),
    invalid("lfs-pointer", "a git-lfs pointer instead of the file", f"{WEIGHTS} lfs", model, lfs_pointer),
    invalid("header-too-long", "a header longer than the file", f"{WEIGHTS} header", model,
            lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x00{}")),
    invalid("pickle-only", "no safetensors, only a pickle", "safetensors pickle .bin", model, pickle_only),
    invalid("config-broken", "config.json is not JSON", "config", model,
            lambda d: (d / "config.json").write_text('{"model_type": "llama"')),
    invalid("config-missing", "no config.json", "config", model, lambda d: (d / "config.json").unlink()),
]  # fmt: skip


def expect_read(target: Subject, directory: Path, made: Model) -> None:
    """Every expected tensor with its bits, and no other (a tied head may be given)."""
    got = target.call("load_checkpoint", directory)
    if not isinstance(got, dict):
        raise Broken("a mapping of names to tensors", type(got).__name__)
    missing = sorted(made.expected.keys() - got.keys())
    extra = sorted(got.keys() - made.expected.keys() - {HEAD})
    if missing or extra:
        raise Broken("the model's tensors, quantized ones as .weight", f"missing {missing[:3]}, unexpected {extra[:3]}")
    for name, expected in made.expected.items():
        expect_equal(expect_tensor(got[name], expected.dtype, tuple(expected.shape)), expected, name)


def refused(target: Subject, directory: Path) -> bool:
    """Whether the target raises; a crash is no refusal."""
    try:
        target.raw("load_checkpoint", directory)
    except Crash as crash:
        raise Broken("tensors or a refusal", str(crash)) from crash
    except Exception:
        return True
    return False


def check_of(case: Case) -> Check:
    """The check of one directory."""

    def body(target: Subject) -> None:
        with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
            directory = Path(folder) / case.id
            made = case.write(directory)
            if case.kind == "valid":
                return expect_read(target, directory, made)
            if case.kind == "acceptable":
                return None if refused(target, directory) else expect_read(target, directory, made)
            message = target.refuses("load_checkpoint", (directory,), case.comment, Exception)
            if not any(word.lower() in message.lower() for word in case.words):
                raise Broken(f"a message with one of {', '.join(case.words)}", message[:300])
        return None

    verb = {"valid": "reads", "acceptable": "reads-or-refuses", "invalid": "refuses"}[case.kind]
    body.__doc__ = f"{verb.replace('-', ' ')}: {case.comment}."
    return rule(f"L4.{verb}.{case.id}", "load_checkpoint")(body)


CHECKS = [check_of(case) for case in CASES]


def write_case(id: str, directory: str | Path | None = None) -> Path:
    """Write the directory of one case, to look at or to load, and return where it is."""
    place = Path(directory or tempfile.mkdtemp(prefix="oracle-")) / id
    next(case for case in CASES if case.id == id).write(place)
    return place
