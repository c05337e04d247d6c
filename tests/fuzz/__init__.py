"""Spoiled files of every format that mbert reads: each is refused in one line, or does no harm."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MBERT_ALLOWED_BASES"] = "base"
