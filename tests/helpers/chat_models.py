"""A model of random weights that can be talked to."""

from tests.helpers import tiny_checkpoints, tiny_tokenizers

CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{{ prefix }}{% endif %}{% if tools %}{{ tools | length }} tools{% endif %}"""


def make_chat_model(directory, context=128):
    """The directory, with a checkpoint of one layer and a context of so many tokens."""
    tiny_checkpoints.make_dense(directory, vocab_size=420, num_hidden_layers=1, max_position_embeddings=context)
    config = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "<|im_end|>", "chat_template": CHATML}
    return str(tiny_tokenizers.write(directory, tiny_tokenizers.byte_level(), tokenizer_config=config))
