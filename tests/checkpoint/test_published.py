"""What makers publish of their models: how many parameters there are, and what ends a text, for each family.

Sizes are those of the config.json of each repository. The counts come from where the last column says; those with a "B"
are rounded there.
"""

from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.families import FAMILIES
from miniawq.checkpoint.opening import linear_shapes, meta_model
from miniawq.commands.plan import tensors_from_config
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_tokenizers
from tests.helpers.tiny_checkpoints import AWQ_BLOCK

CARD, FILES, KERAS = "model card", "safetensors metadata", "keras-hub presets"
# repository: (class, hidden, intermediate, layers, heads, kv heads, vocabulary, tied), other keys, parameters, source
PUBLISHED = {
    "mistralai/Ministral-8B-Instruct-2410": (
        ("Ministral", 4096, 12288, 36, 32, 8, 131072, False), {"head_dim": 128}, "8,019,808,256", CARD,
    ),
    "mistralai/Ministral-3-14B-Instruct-2512": (
        ("Ministral3", 5120, 16384, 40, 32, 8, 131072, False), {"head_dim": 128}, "13.5B", CARD,
    ),
    "mistralai/Ministral-3-3B-Instruct-2512": (
        ("Ministral3", 3072, 9216, 26, 32, 8, 131072, True), {"head_dim": 128}, "3.4B", CARD,
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (
        ("SeedOss", 5120, 27648, 64, 80, 8, 155136, False), {"head_dim": 128}, "36,151,104,512", FILES,
    ),
    "HuggingFaceTB/SmolLM3-3B": (("SmolLM3", 2048, 11008, 36, 16, 4, 128256, True), {}, "3,075,098,624", FILES),
    "ibm-granite/granite-3.3-2b-instruct": (
        ("Granite", 2048, 8192, 40, 32, 8, 49159, True), {}, "2,533,539,840", FILES,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        ("Granite", 4096, 12800, 40, 32, 8, 49159, True), {}, "8,170,864,640", FILES,
    ),
    "ibm-granite/granite-4.0-micro": (
        ("GraniteMoeHybrid", 2560, 8192, 40, 40, 8, 100352, True), {"shared_intermediate_size": 8192},
        "3,402,836,480", FILES,
    ),
    "baidu/ERNIE-4.5-0.3B-PT": (
        ("Ernie4_5", 1024, 3072, 18, 16, 2, 103424, True), {"head_dim": 128}, "360,748,032", FILES,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (("Phi3", 3072, 8192, 32, 32, 32, 32064, False), {}, "3,821,079,552", KERAS),
    "microsoft/phi-4": (("Phi3", 5120, 17920, 40, 40, 10, 100352, False), {}, "14,659,507,200", FILES),
    "microsoft/Phi-4-mini-instruct": (
        ("Phi3", 3072, 8192, 32, 24, 8, 200064, True), {"partial_rotary_factor": 0.75}, "3,836,021,760", FILES,
    ),
    "THUDM/glm-4-9b-chat-hf": (
        ("Glm", 4096, 13696, 40, 32, 2, 151552, False), {"head_dim": 128, "attention_bias": True},
        "9,399,951,360", FILES,
    ),
    "THUDM/GLM-4-9B-0414": (
        ("Glm4", 4096, 13696, 40, 32, 2, 151552, False), {"head_dim": 128, "attention_bias": True},
        "9,400,279,040", FILES,
    ),
    "allenai/OLMo-2-1124-7B": (("Olmo2", 4096, 11008, 32, 32, 32, 100352, False), {}, "7,298,617,344", FILES),
    "google/gemma-3-1b-it": (
        ("Gemma3", 1152, 6912, 26, 4, 1, 262144, True), {"head_dim": 256}, "999,885,952", KERAS,
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": (
        ("Exaone4", 5120, 27392, 64, 40, 8, 102400, False), {"head_dim": 128}, "30.95B without embeddings", CARD,
    ),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": (
        ("Exaone4", 2048, 4096, 30, 32, 8, 102400, True), {"head_dim": 64}, "1.07B without embeddings", CARD,
    ),
}  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# Their numbers of parameters were not found: InternLM3, Hunyuan, Helium. The others are in tests/commands/test_plan.py.
COUNTED_ELSEWHERE = {"Llama", "Mistral", "Qwen2", "Qwen3"} | {"InternLM3", "HunYuanDenseV1", "Helium"}


def config_of(repository: str) -> dict[str, Any]:
    (family, *sizes, vocab, tied), more, _, _ = PUBLISHED[repository]
    config = {"architectures": [f"{family}ForCausalLM"], "max_position_embeddings": 4096, "vocab_size": vocab}
    return config | dict(zip(SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied} | more


@pytest.mark.parametrize("repository", PUBLISHED)
def test_parameters_are_as_many_as_published(repository):
    (*_, tied), _, published, _ = PUBLISHED[repository]
    tensors = meta_model(llama_config(config_of(repository))).state_dict()
    left_out = {"lm_head.weight"} if tied else set()
    if "without embeddings" in published:
        left_out = {"lm_head.weight", "model.embed_tokens.weight"}
    count = sum(tensor.numel() for name, tensor in tensors.items() if name not in left_out)
    number, rounded, _ = published.partition("B")
    digits = len(number.partition(".")[2])
    assert (f"{count / 1e9:.{digits}f}" if rounded else f"{count:,}") == number


@pytest.mark.parametrize("repository", [name for name, row in PUBLISHED.items() if "B" not in row[2]])
def test_plan_counts_as_many_bytes_as_parameters_take(repository):
    """In groups of 128 a packed weight takes 4 bits, and 16 and 4 for each group; all others take 16."""
    config = config_of(repository)
    model = meta_model(llama_config(config))
    packed = sum(inputs * outputs for name, (inputs, outputs) in linear_shapes(model).items() if name != "lm_head")
    others = int(PUBLISHED[repository][2].replace(",", "")) - packed
    specs = tensors_from_config(config | {"quantization_config": AWQ_BLOCK | {"group_size": 128}})
    assert sum(spec.nbytes for spec in specs) == packed * (4 + (16 + 4) / 128) / 8 + 2 * others


def test_every_family_is_counted():
    counted = {row[0][0] for row in PUBLISHED.values()} | COUNTED_ELSEWHERE
    assert {f"{family}ForCausalLM" for family in counted} == FAMILIES.keys()


# The ids that config.json and generation_config.json name.
ENDS = {
    "meta-llama/Llama-3.1-8B-Instruct": ([128001, 128008, 128009], [128001, 128008, 128009]),
    "Qwen/Qwen2.5-7B-Instruct": (151645, [151645, 151643]),
    "microsoft/Phi-3.5-mini-instruct": (32000, [32007, 32001, 32000]),
    "microsoft/Phi-4-mini-instruct": (199999, [200020, 199999]),
    "google/gemma-3-1b-it": ([1, 106], [1, 106]),
    "THUDM/GLM-4-9B-0414": ([151329, 151336, 151338], [151329, 151336, 151338]),
    "ibm-granite/granite-3.3-2b-instruct": (0, 0),
}


@pytest.mark.parametrize("repository", ENDS)
def test_every_published_end_ends_a_text(repository, tmp_path):
    config, generation_config = ({"eos_token_id": ids} for ids in ENDS[repository])
    tiny_tokenizers.write(
        tmp_path, tiny_tokenizers.byte_level(), config=config, generation_config=generation_config, tokenizer_config={}
    )
    stated = [ids if isinstance(ids, list) else [ids] for ids in ENDS[repository]]
    assert Tokenizer(tmp_path).eos_ids == {token_id for ids in stated for token_id in ids}


# How each family's template writes a turn, and the special token that it writes after an answer, if there is one.
TURN = {
    "Phi 3": ("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|end|>"),
    "Phi 4": ("<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>", "<|im_end|>"),
    "Gemma 3": (
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        "<end_of_turn>",
    ),
    "GLM 4": ("<|{{ m.role }}|>\n{{ m.content }}", None),  # the user's next turn ends an answer
    "EXAONE 4": ("[|{{ m.role }}|]\n{{ m.content }}[|endofturn|]\n", "[|endofturn|]"),
    "Granite": ("<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n", "<|end_of_text|>"),
    "Seed-OSS": ("<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>", "<seed:eos>"),
    "OLMo 2": ("<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n", "</s>"),
    "Ministral": (
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}",
        "</s>",
    ),
}


@pytest.mark.parametrize("family", TURN)
def test_the_token_after_an_answer_ends_it_in_each_family(family, tmp_path):
    turn, end = TURN[family]
    raw = RawTokenizer.from_str(tiny_tokenizers.byte_level())
    raw.add_special_tokens([AddedToken(token, special=True) for _, token in TURN.values() if token])
    config = {"eos_token": "</s>", "chat_template": "{% for m in messages %}" + turn + "{% endfor %}"}
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, raw.to_str(), tokenizer_config=config))
    found = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in tokenizer.end_of_turn_ids()]
    assert found == ([] if end is None else [end])
