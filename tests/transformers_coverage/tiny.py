"""Any transformers configuration, made small: its integers are set by the meaning of their names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

#: VOCAB is the number of classes, which no other size of a tiny model equals. Special tokens with ids below PLAIN_IDS
#: (padding, begin, end) keep them, others (images, ...) get ids from SPECIAL_IDS on. The ids in batches lie between the
#: two.
VOCAB, PLAIN_IDS, SPECIAL_IDS = 127, 10, 30
NUM_LABELS = 5


class Scale(NamedTuple):
    """Sizes of a model. The defaults suit most models; LADDER has those that others need."""

    layers: int = 2
    kv_heads: int = 2
    heads: int = 4
    head_dim: int = 16

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


LADDER = (
    Scale(),
    Scale(kv_heads=4),
    Scale(kv_heads=4, layers=4),
    Scale(kv_heads=4, layers=8),
    Scale(heads=2, head_dim=128),  # for fixed sections of rotary embeddings, whatever the configuration says
    Scale(heads=2, head_dim=64),
)

#: What an integer is set to, by the end of its name. The first match counts. The integer becomes that attribute of
#: Scale or that number, unless it is smaller already.
_MEANINGS: tuple[tuple[str | int, str], ...] = (
    (VOCAB, "vocab_size|vocab_size_per_layer_input|num_embeddings|ngram_vocab_size_base|hash_byte_group_vocab"),
    (0, "num_kv_shared_layers"),
    (1, "n_group|expert_group|topk_group|self_attends_per_block|layers_per_stack|depths|block_sizes|add_layers"),
    (2, "experts_per_tok|experts_per_token|topk|top_k|moe_k|n_top|heads_per_ngram|loss_num_heads"),
    ("kv_heads", "kv_heads|key_value_heads|kv_n_heads|linear_num_key_heads|query_groups"),
    (8, "mamba_heads|mamba_n_heads|mamba_num_heads|rope_head_dim|rotary_dim|index_head_dim|d_rel"),
    ("heads", "heads|heads_per_layer|n_head"),
    (24, "qk_head_dim"),
    ("head_dim", "head_dim|d_head|dim_head|d_kv|kv_channels|headdim|query_pre_attn_scalar"),
    (16, "size_per_layer_input|rank|state_size|d_state|hc_lowrank|bottleneck_size|hash_byte_group_size"),
    ("layers", "layers|layer|blocks|depth"),
    (4, "experts|expert_num"),
    (96, "intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|n_inner|d_inner|intermediate_size_mlp"),
    (32, "image_size|input_size|resolution|crop_size"),
    (32, "mel_bins|feat_per_channel|feat_size|feature_size|source_positions"),
    (16, "num_position_embeddings|num_patches|seq_length|image_tokens|tokens_per_image"),
    (128, "position_embeddings|positions|n_ctx|max_seq_len|max_length|context_length|mamba_d_ssm|codebook_size"),
    (8, "patch_size|sliding_window|attention_window|window_size|local_attention|block_size|chunk_size"),
    (8, "latents|query_tokens|latent_query_num|landmarks|global_tokens|segment_means_seq_len"),
    ("hidden", "hidden_size|hidden_sizes|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|emb_size|embd"),
    ("hidden", "dim|width|size_global|d_latents|channels|filters|units|proj_size|embed_size"),
)
_KEPT = re.compile(
    r"((num|in|image|audio|input)_)?channels|chunk_size_feed_forward|.*(groups|_ratio|kernel.*|stride.*)"
)
#: Arguments that models need although their default is None.
_REQUIRED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
_OFF = ("use_cache", "use_mamba_kernels")
_TOKENS = re.compile(r".*_(token_id|token_index|id)|.*_token_ids|vocab_offset")
_LAYER_NUMBERS = re.compile(r".*(layer|index(es)?|indices|idxs|layer_ids|layer_index|layers)")


def tiny(cls: Any, scale: Scale, overrides: Mapping[str, Any]) -> Any:
    """A model of a class, with random weights.

    `overrides` has arguments of its configuration; those of a part are in a nested mapping. The key "parts" names model
    types for the parts of a configuration that has no defaults.
    """
    overrides = dict(overrides)
    parts = {name: CONFIG_MAPPING[kind]().to_dict() for name, kind in overrides.pop("parts", {}).items()}
    config = cls.config_class(**_Shrinker(scale).arguments(cls.config_class(**parts), overrides))
    torch.manual_seed(0)
    model = cls(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():  # some are torch.empty, for a checkpoint to fill
            if not (parameter.isfinite().all() and parameter.abs().max() < 100):
                parameter.normal_(std=0.02)
    return model


class _Shrinker:
    """Shrinks one configuration and its parts, so that a token has the same id in all of them."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.tokens: dict[int, int] = {}

    def arguments(self, config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a small configuration of the same class, without those that it derives from others."""
        declared, default = _declared(config), _default(config)
        values = {name: _get(config, name, declared[name]) for name in declared}
        layers = {v for name, v in values.items() if _meaning(name) == "layers" and isinstance(v, int)}
        arguments: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, PretrainedConfig):
                part = self.arguments(value, overrides.get(name, {}))
                arguments[name] = {"model_type": value.model_type, **part}
            elif name in _OFF:
                arguments[name] = False
            elif value is None and name in _REQUIRED:
                arguments[name] = self._integer(name, 1 << 62)
            elif value == declared[name] or value != _get(default, name, None):
                arguments[name] = self._value(name, value, layers)
        if "vocab_size" in declared and _get(config, "pad_token_id", None) is None:
            arguments["pad_token_id"] = 0
        return arguments | {k: v for k, v in overrides.items() if not isinstance(values.get(k), PretrainedConfig)}

    def _value(self, name: str, value: Any, layers: set[Any]) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._integer(name, value)
        if isinstance(value, float):
            return 0.0 if re.search(r"drop|mask_\w+_prob", name) else value
        if isinstance(value, dict):
            return {key: self._section(key, v) if isinstance(v, list) else v for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._list(name, list(value), layers))
        return value

    def _integer(self, name: str, value: int) -> int:
        if _TOKENS.fullmatch(name):
            return self._token(value)
        meaning = None if _KEPT.fullmatch(name) else _meaning(name)
        limit = getattr(self.scale, meaning) if isinstance(meaning, str) else meaning
        return value if limit is None or value <= 0 else min(value, limit)

    def _token(self, value: int) -> int:
        if value < PLAIN_IDS:
            return value
        return self.tokens.setdefault(value, SPECIAL_IDS + len(self.tokens))

    def _list(self, name: str, values: list[Any], layers: set[Any]) -> list[Any]:
        integers = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        if len(values) in layers and len(values) > self.scale.layers:
            values = values[: self.scale.layers]
        elif integers and _LAYER_NUMBERS.fullmatch(name):
            return [v for v in values if v < self.scale.layers] or [self.scale.layers - 1]
        return [self._integer(name, v) for v in values] if integers else values

    def _section(self, name: str, values: list[Any]) -> list[Any]:
        """A list of a rotary embedding: a head's pairs of dimensions in each section, or an entry per pair."""
        pairs = self.scale.head_dim // 2
        if not name.endswith("section"):
            return values[:pairs]
        shares = [max(1, pairs * v // sum(values)) for v in values]
        return [shares[0] + pairs - sum(shares), *shares[1:]]


def _meaning(name: str) -> str | int | None:
    return next((meaning for meaning, ends in _MEANINGS if re.fullmatch(rf"(.*_)?({ends})", name)), None)


def _declared(config: Any) -> dict[str, Any]:
    """The arguments of a configuration's class with their defaults, and the configuration's parts."""
    base = {*inspect.signature(PretrainedConfig.__init__).parameters, "id2label", "label2id", "num_labels"}
    own = [p for p in inspect.signature(type(config).__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parts = {name: None for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    return {p.name: p.default for p in own if p.name not in base or _TOKENS.fullmatch(p.name)} | parts


def _get(config: Any, name: str, default: Any) -> Any:
    """An attribute, or the default if it is missing or cannot be read, as where layers differ."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def _default(config: Any) -> Any:
    try:
        return type(config)()
    except Exception:  # a class without defaults: every argument was given
        return None
