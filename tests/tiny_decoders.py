"""Tiny decoders of every architecture that is tried, built in code: two layers, 16 wide, random weights.

Used by `test_decoders.py`, and by `joinable.py`, which writes README's table from them.
"""

from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 264  # more than the tokenizer's 260, whose last one is the placeholder
WITHOUT_PLACEHOLDER = 259
# Shorter than a prompt with a picture; two layers of it just see the picture's last tokens from the text.
WINDOW = 13
# Of four tokens, the first one padded.
PROMPTS = torch.tensor([[256, 65, 66, 67], *([first, first + 1, 66, 67 + first % 3] for first in range(68, 79))])
MASK = (PROMPTS != 256).long()

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Large enough that attention and logits are far from uniform, so that a wrong mask shows.
    "initializer_range": 0.5,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "bos_token_id": None,
}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# Of those that have it by default.
_NO_DROPOUT = dict.fromkeys(["dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)

# Name -> `model_type`, common fields that it has under other names or not at all, and fields of its own.
DECODERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Qwen2": ("qwen2", (), {}),
    "Qwen2, sliding windows": ("qwen2", (), {"use_sliding_window": True, **_WINDOWS}),
    "Qwen3": ("qwen3", (), {"tie_word_embeddings": True}),
    "Qwen3-MoE": ("qwen3_moe", (), _EXPERTS),
    "Qwen3.5": ("qwen3_5_text", (), _LINEAR),
    "Qwen3-Next": ("qwen3_next", (), {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "Llama": ("llama", (), {}),
    "Mistral, sliding windows": ("mistral", (), {"sliding_window": WINDOW}),
    "Ministral": ("ministral", (), _WINDOWS),
    "Gemma": ("gemma", (), {}),
    "Gemma 3": ("gemma3_text", (), {"tie_word_embeddings": False, **_WINDOWS}),
    "Phi-3": ("phi3", ("head_dim",), {}),
    "SmolLM3": ("smollm3", (), {"no_rope_layer_interval": 2}),
    "OLMo 2": ("olmo2", ("head_dim",), {}),
    "Granite": ("granite", (), {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "StableLM": ("stablelm", (), {}),
    "StarCoder2": ("starcoder2", ("head_dim",), {"sliding_window": WINDOW}),
    "GPT-2": ("gpt2", ("intermediate_size", "num_key_value_heads", "head_dim"), _NO_DROPOUT),
    "GPT-NeoX": ("gpt_neox", ("num_key_value_heads", "head_dim"), {}),
    "OPT": (
        "opt",
        ("intermediate_size", "num_key_value_heads", "head_dim", "initializer_range"),
        {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.5, **_NO_DROPOUT},
    ),
    "GPT-OSS": ("gpt_oss", (), {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOWS}),
    "LFM2": ("lfm2", (), {"layer_types": ["full_attention", "conv"], "conv_L_cache": 3}),
    "Falcon-H1": ("falcon_h1", (), {**_MAMBA, "mamba_d_conv": 3}),
    "BLOOM": ("bloom", (), {}),
}
REFUSED: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Gemma 2": ("gemma2", (), _WINDOWS),
    "Cohere": ("cohere", (), {"logit_scale": 0.0625}),
    "Granite, rescaled": ("granite", (), {"logits_scaling": 8.0}),
    "Phi": ("phi", ("head_dim",), {}),
    "OPT-350m": ("opt", ("intermediate_size", "num_key_value_heads", "head_dim"), {"word_embed_proj_dim": 8}),
    "Mamba": ("mamba", ("intermediate_size",), {"state_size": 4}),
}
"""What cannot be joined."""

ONE_TEXT_A_SEQUENCE = {"Qwen3.5", "Qwen3-Next", "LFM2", "Falcon-H1", "BLOOM"}
"""Whose layers do not keep branches apart."""


def decoder_config(name: str, **fields) -> PreTrainedConfig:
    """Configuration of one of the decoders; `fields` replace what it has."""
    model_type, lacking, own = (DECODERS | REFUSED)[name]
    common = {field: value for field, value in _COMMON.items() if field not in lacking}
    return AutoConfig.for_model(model_type, **{**common, **own, **fields})


def save_decoder(name: str, folder: Path, **fields) -> Path:
    """A folder that looks like the decoder from the Hub, with the tokenizer of all tests."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(decoder_config(name, **fields)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
