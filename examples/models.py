"""The examples' models: by name from a hub or a folder, or a small random one that needs no download."""

import argparse
import itertools
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from data import functions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


def arguments() -> argparse.Namespace:
    """The command-line arguments of every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", metavar="NAME", help="name or folder of a causal model; a small random Llama if absent"
    )
    parser.add_argument("--steps", type=int, default=40)
    return parser.parse_args()


def load(name: str | None, tied: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer). If `tied`, the small model's head is the embedding's weight."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE), tokenizer
    bpe = ByteLevelBPETokenizer()
    texts = itertools.chain.from_iterable(functions())
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<pad>", "<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<end>")
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **tokens, **SIZES)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=DTYPE), tokenizer
