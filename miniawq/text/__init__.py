"""Text to token ids and back: tokenizers, chat templates, and text in pieces while a model writes it.

Others use `Tokenizer` and `TextStream` (tokenizer), `Message` (chat) and `read_text` (plain).
"""
