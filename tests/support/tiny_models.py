"""A random tiny model of every architecture, for unit tests of what the method must know of a model."""

import torch
from torch import nn

_GEMMA = {
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

# The fields of its configuration that make an architecture what it is, beside those of `tiny_model`.
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {},
    "Ministral": {"head_dim": 8},
    "Ministral3": {"head_dim": 8},
    "SeedOss": {"head_dim": 8},
    "Granite": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
    "Gemma": {"head_dim": 12},
    "Gemma2": _GEMMA,
    "Gemma3": _GEMMA,
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


def tiny_model(architecture: str, *, linearize: bool = True, **overrides):
    """A random `{architecture}ForCausalLM` in float32 and evaluation mode, the same at every call.

    2 layers, hidden 32, 4 query and 2 key-value heads, intermediate 28, vocabulary 64. Weights are drawn wide enough
    (0.25) that attention is not uniform and gates are not linear; norms have gains and biases values of their own, so
    that none can be left out unnoticed.

    Args:
        architecture: a key of `ARCHITECTURES`, or any other name that transformers has a class for.
        linearize: make linear layers of the experts, as llm-compressor's oneshot does first.
        overrides: fields of the configuration.
    """
    import transformers
    from llmcompressor.modeling.moe.linearize import linearize_moe

    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model_class = getattr(transformers, f"{architecture}ForCausalLM")
    config = model_class.config_class(**(fields | ARCHITECTURES.get(architecture, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        for module in model.modules():
            if type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None:
                module.weight.data += torch.rand_like(module.weight) - 0.5
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.25)
    return linearize_moe(model) if linearize else model
