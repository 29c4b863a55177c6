"""Runs of TRL's trainers that its tests share: tiny models, their data, and what is compared."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from . import trainer_runs
from .hf_worker import V, llama

datasets, trl, peft = (pytest.importorskip(name) for name in ("datasets", "trl", "peft"))
datasets.disable_progress_bars()

SETTINGS = trainer_runs.SETTINGS | {"learning_rate": 0.1, "bf16": False, "gradient_checkpointing": False}
WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "cat", "sat", "on", "its", "mat",
]  # fmt: skip
TRAINERS = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig),
    "DPO": (trl.DPOTrainer, trl.DPOConfig),
    "KTO": (trl.KTOTrainer, trl.KTOConfig),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig),
}
#: Those that distil, which TRL 1.16 has.
DISTILLERS = ("distillation", "GKD")
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
#: Parts of the names of metrics that differ between equal runs.
_TIMES = ("runtime", "time", "per_second", "flos")


def texts(seed, count=16):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(count)]


def tokenizer_of(texts):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "<eos>", "<unk>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    assert tokenizer.get_vocab_size() <= V
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def one_layer():
    return llama(num_hidden_layers=1)


def mixtral():
    """A mixture of experts with its auxiliary loss, and the same weights every time."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3,
        "router_aux_loss_coef": 0.5, "output_router_logits": True, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2,
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes))


def rewards(completions, **_):
    return [float(len(set(text)) + text.count("a")) for text in completions]


def trainer_of(name, folder, *, make=one_layer, lora=False, evaluated=False, cls=None, **settings):
    """A trainer of a fresh model, before it trains."""
    if name in DISTILLERS:
        return distiller_of(name, folder, make, lora, settings)
    trainer, config = TRAINERS[name]
    prompts, completions, others = texts(0), [" " + t for t in texts(1)], [" " + t for t in texts(2)]
    columns = {
        "SFT": {"prompt": prompts, "completion": completions},
        "DPO": {"prompt": prompts, "chosen": completions, "rejected": others},
        "KTO": {"prompt": prompts, "completion": completions, "label": [i % 3 > 0 for i in range(len(prompts))]},
    }.get(name, {"prompt": prompts})
    given = {"train_dataset": datasets.Dataset.from_dict(columns)}
    if settings.get("packing"):
        given["train_dataset"] = datasets.Dataset.from_dict({"text": list(map(str.__add__, prompts, completions))})
    if evaluated:
        given["eval_dataset"] = given["train_dataset"].select(range(4))
        settings = {"eval_strategy": "steps", "eval_steps": 10, **settings}
    if name in ("GRPO", "RLOO"):
        given["reward_funcs"] = rewards
        settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0, **settings}
    elif name == "SFT":
        settings = {"max_length": 24, **settings}
    if lora:
        given["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    elif name in ("DPO", "KTO"):
        given["ref_model"] = make()
    arguments = config(str(folder), **{**SETTINGS, **settings})
    tokenizer = tokenizer_of(prompts + completions + others)
    return (cls or trainer)(model=make(), args=arguments, processing_class=tokenizer, **given)


def distiller_of(name, folder, make, lora, settings):
    """A trainer that distils a larger model into a fresh one, before it trains."""
    prompts, completions = texts(0), [" " + t for t in texts(1)]
    tokenizer = tokenizer_of(prompts + completions)
    tokenizer.chat_template = CHAT
    teacher = llama(num_hidden_layers=2, hidden_size=32)
    given = {"processing_class": tokenizer, "teacher_model": teacher}
    if lora:
        given["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if name == "GKD":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        trainer, config = GKDTrainer, GKDConfig
        turns = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(prompts, completions, strict=True)
        ]
        given["train_dataset"] = datasets.Dataset.from_dict({"messages": turns})
        settings = {"lmbda": 0.0, "max_length": 24, **settings}
    else:
        trainer, config = trl.DistillationTrainer, trl.DistillationConfig
        given["train_dataset"] = datasets.Dataset.from_dict({"prompt": prompts})
        settings = {"max_completion_length": 6, **settings}
    return trainer(model=make(), args=config(str(folder), **{**SETTINGS, **settings}), **given)


def history(trainer):
    """Every metric that was logged, by step, without what depends on time."""
    return [
        {name: value for name, value in entry.items() if not any(time in name for time in _TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same_runs(ours, stock, half=False):
    """Metrics of every step and parameters at the end are equal, and every parameter was trained."""
    mine, theirs = history(ours), history(stock)
    rtol, atol = (3e-2, 2e-2) if half else (1e-4, 2e-5)
    assert [entry.keys() for entry in mine] == [entry.keys() for entry in theirs]
    for step, (got, wanted) in enumerate(zip(mine, theirs, strict=True)):
        for name in wanted:
            if half and "accurac" in name:
                continue  # a near tie may be decided by rounding
            bound = atol + rtol * abs(wanted[name])
            assert abs(got[name] - wanted[name]) <= bound, f"step {step}: {name} is {got[name]}, TRL's {wanted[name]}"
    before = dict(stock.initial)
    for (name, p), q in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        if p.requires_grad:
            assert not torch.equal(p, before[name]), f"{name} was not trained"
