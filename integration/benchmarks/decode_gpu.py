"""A random Llama decodes in transformers on a GPU: dense, and then with its linear layers sparse.

The cache is static, and a step of all layers, the choice of the next tokens included, is one CUDA graph, so that no
overhead of the host flatters either side.
"""

from collections.abc import Callable, Iterator
from statistics import NormalDist, median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from efx_plugin.kernels import PackedWeight, pack, sparse_linear

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SPARSITY = 0.5
SEQUENCES = (1, 8, 32)
PROMPT, STEPS, ROUNDS = 128, 24, 5  # tokens; steps of a round
TOLERANCE = 0.1  # of the logits, in which the roundings of all layers add up
SHARE = 0.6  # of the free memory that the dense model may take: sparse weights come while dense ones are there

Graphs = Callable[[Callable[[], object]], Callable[[], float]]  # makes a graph of calls, which returns its seconds


class SparseLinear(torch.nn.Module):
    """In the place of a torch.nn.Linear with zeros."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.packed: PackedWeight = pack(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.packed, self.bias)


class Decoding:
    """Greedy decoding of several sequences."""

    def __init__(self, model: LlamaForCausalLM, sequences: int, prompt: int, steps: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + steps)
        generator = torch.Generator(model.device).manual_seed(0)
        shape = sequences, prompt
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator, device=model.device)
        self.tokens = tokens[:, -1:].clone()
        self.first_logits = self._logits(tokens)

    def step(self) -> None:
        """Put the next token of each sequence into `tokens`."""
        self.tokens.copy_(self._logits(self.tokens).argmax(-1))

    def _logits(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:]


def measure_model(fields: dict, device: str, graphs: Graphs) -> Iterator[dict]:
    """The records of both models, of as many layers as there is room for, and how far apart their logits are."""
    torch.cuda.empty_cache()
    fields, free = dict(fields), torch.cuda.mem_get_info()[0]
    while 2 * parameters(fields) > SHARE * free and fields["num_hidden_layers"] > 1:
        fields["num_hidden_layers"] //= 2
    before = torch.cuda.memory_allocated()
    model = make_model(fields, device)
    common = {"what": "model", "layers": fields["num_hidden_layers"], "parameters": parameters(fields)}
    logits: dict[str, Tensor] = {}
    linears = dense_bytes(model)
    for form in ("dense", "sparse"):
        if form == "sparse":
            make_sparse(model)
            linears = packed_bytes(model)
        memory = torch.cuda.memory_allocated() - before
        for sequences in SEQUENCES:
            decoding = Decoding(model, sequences, PROMPT, STEPS * (ROUNDS + 2) + 2)
            logits.setdefault(f"{form} {sequences}", decoding.first_logits.float())
            graph = graphs(decoding.step)
            rounds = [sum(graph() for _ in range(STEPS)) for _ in range(ROUNDS + 1)][1:]
            yield common | {
                "form": form,
                "sequences": sequences,
                "tokens_per_s": sequences * STEPS / median(rounds),
                "bytes": memory,
                "linear_bytes": linears,
            }
            del decoding, graph
    for sequences in SEQUENCES:
        dense, sparse = logits[f"dense {sequences}"], logits[f"sparse {sequences}"]
        error = ((sparse - dense).norm() / dense.norm()).item()
        yield common | {"what": "logits", "sequences": sequences, "error": error, "right": error < TOLERANCE}


def make_model(fields: dict, device: str) -> LlamaForCausalLM:
    """A random bfloat16 model whose linear layers, but for the head, have zeros."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**fields)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for linear in linear_layers(model).values():
        threshold = model.config.initializer_range * NormalDist().inv_cdf(0.5 + SPARSITY / 2)
        linear.weight.masked_fill_(linear.weight.abs() < threshold, 0)
    return model


def make_sparse(model: LlamaForCausalLM) -> None:
    """Replace the linear layers one after the other, so that one is there twice at a time."""
    for name, linear in linear_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, SparseLinear(linear))


def linear_layers(model: LlamaForCausalLM) -> dict[str, torch.nn.Linear]:
    return {name: one for name, one in model.model.named_modules(prefix="model") if isinstance(one, torch.nn.Linear)}


def dense_bytes(model: LlamaForCausalLM) -> int:
    return sum(linear.weight.nbytes for linear in linear_layers(model).values())


def packed_bytes(model: LlamaForCausalLM) -> int:
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return sum(tensor.nbytes for layer in layers for tensor in layer.packed.tensors)


def parameters(fields: dict) -> int:
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    keys = hidden * fields["num_key_value_heads"] // fields["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return int(fields["num_hidden_layers"] * layer + 2 * fields["vocab_size"] * hidden)
