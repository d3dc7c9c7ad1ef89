"""The verbs that have no room of their own, one file each, and the parts of `miniawq generate` around its loop.

`miniawq/__main__.py` uses `build_parser` and `main` of convert, evaluate and plan. `generate.py` uses flags (its
parser), prompts (the text to continue), interactive (a conversation) and figures (what it tells about a text). Scores
and contest are parts of evaluate: what predictions come to, and one model in several formats.
"""
