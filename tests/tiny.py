"""Two-layer random models of every supported architecture, and rows to feed them: the ground of all fast tests."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task

WORDS = tuple("good bad fine poor cat dog man woman sees likes the a one two not very film plot".split())  # noqa: SIM905
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")

_COMMON = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_COMMON},
    "minilm": {**_COMMON, "hidden_size": 24, "num_attention_heads": 4},
    "roberta": {**_COMMON, "type_vocab_size": 1},
    "xlm-roberta": {**_COMMON, "type_vocab_size": 1},
    "camembert": {**_COMMON, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": _COMMON["vocab_size"],
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 48,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    },
    "electra": {**_COMMON, "embedding_size": 16},
    "deberta-v2": {
        **_COMMON,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "type_vocab_size": 0,
    },
    "modernbert": {
        **_COMMON,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
    },
}
ARCHITECTURES = tuple(CONFIGS)
DISTINCT = tuple(name for name in ARCHITECTURES if name not in ("minilm", "xlm-roberta", "camembert"))
"""Those whose code in transformers is their own: MiniLM's is BERT's, XLM-RoBERTa's and CamemBERT's is RoBERTa's."""
_WITH_TOKEN_TYPES = ("bert", "minilm", "electra")


def write_tiny(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write a tiny random model of ``architecture`` and its tokenizer to ``folder``; returns the folder."""
    kind = "bert" if architecture == "minilm" else architecture
    config = AutoConfig.for_model(kind, **CONFIGS[architecture])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(folder)
    _tokenizer(architecture).save_pretrained(folder)
    return folder


def _tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if architecture not in _WITH_TOKEN_TYPES:
        names.remove("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=names,
        model_max_length=40,
    )


def tiny_rows(task: Task, count: int, seed: int = 0) -> Rows:
    """Rows whose label follows from the words, so that training can learn something."""
    source = random.Random(f"{task.name} {seed}")
    texts, labels = [], []
    for _ in range(count):
        row = tuple(" ".join(source.choices(WORDS, k=source.randint(2, 9))) for _ in task.text)
        share = sum(WORDS.index(word) for text in row for word in text.split()) / sum(len(t.split()) for t in row)
        share /= len(WORDS) - 1
        texts.append(row)
        if task.range is None:
            labels.append(float(min(int(share * len(task.labels)), len(task.labels) - 1)))
        else:
            labels.append(round(task.range[0] + share * (task.range[1] - task.range[0]), 2))
    return Rows(tuple(texts), tuple(labels), f"tiny {task.name}")
