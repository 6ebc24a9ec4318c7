"""Tiny random models of every causal architecture that the installed transformers knows.

A configuration is made from the architecture's default one: sizes are set by the names of their fields, and of lists
with an entry per layer one entry of each kind stays. What that does not fit has its own sizes in ``OWN``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
# Field names of the same meaning have the same value.
SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size text_vocab_size n_words vocab_size_per_layer_input pronunciation_vocab_size "
    "shape_vocab_size encoder_hash_byte_group_vocab",
    128: "max_position_embeddings n_positions max_seq_len max_sequence_length context_length n_ctx",
    48: "intermediate_size ffn_dim n_inner dff ffn_hidden_size d_ff d_inner decoder_ffn_dim encoder_ffn_dim dim_ff "
    "shared_intermediate_size intermediate_size_mlp feed_forward_size",
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim model_dim lru_width embed_dim emb_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window attention_window_size window_size "
    "chunk_size mamba_chunk_size linear_key_head_dim linear_value_head_dim state_size mamba_d_state ssm_state_size "
    "d_state attention_chunk_size hidden_size_per_layer_input dim_head",
    4: "num_attention_heads n_head num_heads attention_heads n_heads decoder_attention_heads encoder_attention_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads "
    "mamba_num_heads n_mamba_heads rotary_dim",
    2: "num_hidden_layers n_layer num_layers n_layers num_decoder_layers decoder_layers encoder_layers "
    "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token top_k moe_topk moe_k "
    "linear_num_key_heads",
    1: "n_group topk_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace n_shared_experts",
    0: "num_nextn_predict_layers num_kv_shared_layers",
}
SMALL = {name: value for value, names in SIZES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# These are sizes too where the default configuration leaves them open.
OPEN = {"head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dots3_note": {"adapter_in_dim": 32},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> dict[str, list[str]]:
    """Model types by the class that they are loaded as, first the one that it is called after."""
    found: dict[str, list[str]] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name, []).append(model_type)
    for name, types in found.items():
        types.sort(key=lambda t: not name.lower().startswith(t.replace("_", "").replace("-", "")))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def tiny_config(model_type: str) -> Any:
    """A small configuration of this type."""
    make = CONFIG_MAPPING[model_type]
    return make(**(_small(make()) | OWN.get(model_type, {})))


def _small(default: Any) -> dict[str, Any]:
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if hasattr(value, "to_dict"):  # a part of a model for text and images
            found[name] = _small(value)
        elif name in SMALL and (type(value) is int or (value is None and name in OPEN)):
            found[name] = SMALL[name]
        elif name.endswith("_token_id") and type(value) is int:
            found[name] = min(value, 3)
        elif name == "is_decoder":
            found[name] = True
        elif type(value) is float and ("drop" in name or "jitter" in name):  # two passes are to be the same
            found[name] = 0.0
    if "kv_lora_rank" in fields:  # their heads have keys and values of their own
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
    layers = next((fields[name] for name in LAYERS if name in fields), None)
    lists = {n: list(v) for n, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == layers}
    if lists:
        kinds = [str(kind) for kind in zip(*lists.values(), strict=True)]
        kept = sorted({kinds.index(kind) for kind in kinds} | {0, 1})
        found |= {name: [value[i] for i in kept] for name, value in lists.items()}
        found |= {name: len(kept) for name in LAYERS if name in fields}
    return found


def tiny_model(model_type: str) -> Any:
    """A model of this type with random weights, in float32 and evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.2)
            elif not name.endswith("A_log"):  # ones and zeros would hide what is left out
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    # generate() must neither stop nor avoid to stop.
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.float().eval()
