"""Data that only some classes need.

A key is a class of transformers or a model type. CONFIG has arguments of its configuration (those of its parts in
nested mappings), INPUTS arguments of its forward. REASONS says why a class is not built.
"""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"text_config": {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}}

CONFIG: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"parts": {"encoder": "bert", "decoder": "bert"}},
    "vision-encoder-decoder": {
        "parts": {"encoder": "vit", "decoder": "bert"},
        "decoder_start_token_id": 1,
        "decoder": {"is_decoder": True, "add_cross_attention": True},
    },
    "speech-encoder-decoder": {
        "parts": {"encoder": "wav2vec2", "decoder": "bert"},
        "decoder_start_token_id": 1,
        "decoder": {"is_decoder": True, "add_cross_attention": True},
    },
    "blip-2": {"image_token_index": 30},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cohere_asr": {"decoder_start_token_id": 1},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "instructblip": {"image_token_index": 30},
    "instructblipvideo": {"video_token_index": 30},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "reformer": {"axial_pos_embds": False},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "cosmos3_edge": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}},
    "dots3_note": {
        "text_config": {"layer_types": ["full_attention", "sliding_attention"]},
        "vision_config": {"mlp_layer_types": ["dense", "dense"]},
        "audio_config": {"adapter_input_size": 64},
    },
    "dots3_note_text": {"layer_types": ["full_attention", "sliding_attention"]},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "granite4_vision": {"downsample_rate": "2/4", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"vocab_size": 61},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "visual_embed": False},
    "lilt": {"hidden_size": 96},
    "t5": {"decoder_start_token_id": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "glm4v": _SECTIONS,
    "glm4v_moe": {"text_config": {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}},
    "mllama": {"text_config": {"rope_scaling": {"rope_type": "default"}}},
    "mllama_text_model": {"rope_scaling": {"rope_type": "default"}},
    "qwen2_vl": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "qwen3_vl": _SECTIONS,
    "qwen3_vl_moe": _SECTIONS,
    "transfo-xl": {"cutoffs": [20, 40, 80]},
}

INPUTS: dict[str, dict[str, Any]] = {
    "blip-2": {"input_ids": ("images", 30, 8)},
    "canary": {"input_features": ("floats", 3, 64, 32)},
    "cohere_asr": {"input_features": ("floats", 3, 64, 32)},
    "dia": {"decoder_input_ids": ("ids", 3, 16, 9), "labels": ("labels", 27, 16)},
    "idefics": {"pixel_values": ("floats", 3, 1, 3, 32, 32), "image_attention_mask": ("ones", 3, 16, 1)},
    "instructblip": {"input_ids": ("images", 30, 8), "qformer_input_ids": ("ids", 3, 16)},
    "instructblipvideo": {
        "input_ids": ("images", 30, 8),
        "qformer_input_ids": ("ids", 3, 16),
        "pixel_values": ("floats", 3, 1, 3, 32, 32),
    },
    "kosmos-2": {"image_embeds": ("floats", 3, 8, 64), "image_embeds_position_mask": ("first", 8)},
    "musicgen": {"input_ids": ("ids", 12, 16), "labels": ("labels", 3, 16, 4)},
    "musicgen_decoder": {"input_ids": ("ids", 12, 16), "labels": ("labels", 3, 16, 4)},
    "musicgen_melody_decoder": {"input_ids": ("ids", 12, 16), "labels": ("labels", 3, 16, 4)},
    "pix2struct": {"flattened_patches": ("ones", 3, 10, 66), "decoder_input_ids": ("ids", 3, 16)},
    "speech-encoder-decoder": {"input_values": ("floats", 3, 4000), "input_features": None},
    "speech_to_text": {"input_features": ("floats", 3, 64, 32)},
    "voxtral_realtime": {"input_features": ("floats", 3, 32, 128)},
    "kyutai_speech_to_text": {"input_ids": ("ids", 3, 16, 33)},
    "LongformerForMultipleChoice": {"global_attention_mask": ("first", 1)},
    "LongformerForQuestionAnswering": {"global_attention_mask": ("first", 1)},
    "PerceiverForMaskedLM": {"input_ids": ("ids", 3, 128), "labels": ("labels", 3, 128)},
    "lxmert": {"visual_feats": ("floats", 3, 4, 64), "visual_pos": ("floats", 3, 4, 4), "labels": ("ids", 3)},
}

_ASSISTANT = "an assistant: it runs on the keys and values of another model"

REASONS: dict[str, str] = {
    "Gemma4AssistantForCausalLM": _ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": _ASSISTANT,
    "PI0ForConditionalGeneration": "takes no labels: its loss is that of flow matching",
}
