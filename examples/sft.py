"""TRL's SFTTrainer with this package's loss: completions of Python functions, with z-loss."""

import argparse
import ast
import itertools
import sysconfig
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from fused_ignore_ce.hf import fusion_report, patch_model


def functions():
    """A signature as the prompt, its function's body as the completion."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 40:
                head, _, body = "\n".join(lines[node.lineno - 1 : node.end_lineno]).partition("\n")
                yield {"prompt": head + "\n", "completion": body}


class FusedSFTTrainer(SFTTrainer):
    """SFTTrainer has a loss of its own, past the model's; this one takes the model's, which is patched."""

    compute_loss = Trainer.compute_loss


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps
torch.manual_seed(0)
disable_progress_bars()

texts = list(itertools.islice(functions(), 600))
bpe, special = ByteLevelBPETokenizer(), ["<pad>", "<end>"]
lines = itertools.chain(*(text.values() for text in texts))
bpe.train_from_iterator(lines, vocab_size=2048, special_tokens=special, show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<end>")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))
patch_model(model, z_loss=1e-4)

with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3, max_length=64, bf16=False,
        completion_only_loss=True, logging_steps=max(1, steps // 10), save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list(texts)
    trainer = FusedSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
print(fusion_report(model))
