"""The model with its adapter, quantized: by llm-compressor, which users pick instead of pruning, and by us as we prune.

Weights are quantized symmetrically: dense ones by GPTQ, pruned ones by EfficientXpertModifier. Below eight bits GPTQ's
scales are chosen by squared error, not by the largest weight as llm-compressor does unless it is asked: the perplexity
of SmolLM2-135M at four bits is 2 % lower so.

What comes out is a plain model that computes with the stored integers times their scales; where activations are
quantized too, it rounds them as it goes.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor, nn
from transformers import PreTrainedModel

from efx_plugin.checkpoint import save_sparse
from efx_plugin.engine.arguments import Quantization
from efx_plugin.engine.compute_dtype import restore, round_scale
from efx_plugin.evaluate import bits
from efx_plugin.evaluate.pipelines.arguments import take_arguments
from efx_plugin.evaluate.pipelines.draft import Draft
from efx_plugin.evaluate.pipelines.one_shot import expert_modifier
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask

# Tried in turn where the group that is asked for does not divide the inputs of a layer.
_SMALLER_GROUPS = (64, 32, 16)


@dataclass(frozen=True)
class Precision:
    """What weights, and perhaps activations, are rounded to.

    Attributes:
        bits: of a weight.
        group: weights of a row that share a scale; None for the whole row.
        activations: bits of an activation, of which each token has a scale; None leaves them alone.
    """

    bits: int
    group: int | None = None
    activations: int | None = None

    def group_of(self, width: int) -> int | None:
        """The group in a layer with that many inputs: the first that divides them, else the whole row."""
        groups = [] if self.group is None else [self.group, *(size for size in _SMALLER_GROUPS if size < self.group)]
        return next((size for size in groups if width % size == 0), None)

    def scheme(self, group: int | None, targets: list[str]) -> QuantizationScheme:
        """The same in the words of compressed-tensors."""
        weights = QuantizationArgs(
            num_bits=self.bits,
            strategy="channel" if group is None else "group",
            group_size=group,
            observer="memoryless_mse" if self.bits < 8 else None,
        )
        inputs = None
        if self.activations is not None:
            inputs = QuantizationArgs(num_bits=self.activations, strategy="token", dynamic=True)
        return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs)


def w8a8(task: PipelineTask) -> PipelineResult:
    """8-bit weights, a scale for each row; 8-bit activations, a scale for each token."""
    take_arguments(task)
    return _quantize(task, Precision(8, activations=8))


def w8a16(task: PipelineTask) -> PipelineResult:
    """8-bit weights, a scale for each row."""
    take_arguments(task)
    return _quantize(task, Precision(8))


def w4a16(task: PipelineTask) -> PipelineResult:
    """4-bit weights in groups; takes `group`, 128 where it is not given."""
    return _quantize(task, Precision(4, **take_arguments(task, group=128)))


def w3(task: PipelineTask) -> PipelineResult:
    """3-bit weights in groups, simulated; takes `group`, 128 where it is not given."""
    note = "simulated: a checkpoint with 3-bit weights can be written, but vLLM has no kernel that serves it"
    return _quantize(task, Precision(3, **take_arguments(task, group=128)), note)


def expert_w8(task: PipelineTask) -> PipelineResult:
    """As `one_shot.expert`, whose arguments it takes, with `quantization` W8A16: a scale for each row."""
    return _quantize(task, Precision(8), quantization="W8A16")


def expert_w4(task: PipelineTask) -> PipelineResult:
    """As `one_shot.expert`, whose arguments it takes, with `quantization` W4A16: groups of 128, or 64 or 32."""
    return _quantize(task, Precision(4, 128), quantization="W4A16")


def _quantize(
    task: PipelineTask, precision: Precision, *notes: str, quantization: Quantization | None = None
) -> PipelineResult:
    """Quantize the dense expert by GPTQ or, where `quantization` is given, prune and quantize at once."""
    draft = Draft.load(task, adapted=True)
    dense = draft.keep_dense()
    if quantization is None:
        draft.merge()
        draft.calibrate(GPTQModifier(config_groups=_config_groups(draft, precision)))
        sparsities = {}  # what is rounded to zero is not pruned
    else:
        pruner = expert_modifier(draft, quantization=quantization)
        draft.calibrate(pruner)
        sparsities = {layer.name: layer.sparsity for layer in pruner.report}
    model = draft.merge()

    for layer in draft.targets:
        round_scale(layer.base, draft.stored)
    restore(model, draft.dtypes)
    weights = {layer.name: layer.base.weight.detach() for layer in draft.targets}
    checkpoint = task.output / "checkpoint"
    if quantization is None:
        model.save_pretrained(checkpoint)
    else:
        save_sparse(model, checkpoint, progress=False)
    plain = _plain(model, weights, precision)

    damage = dense.damage(plain, task.calibration, draft.reordered)
    layers = [{"name": name, "sparsity": sparsities.get(name, 0.0), "damage": damage[name]} for name in weights]
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return PipelineResult(
        plain,
        sparsity=sum(sparsities.get(name, 0.0) * size for name, size in sizes.items()) / sum(sizes.values()),
        bits_per_weight_stored=bits.stored(checkpoint),
        bits_per_weight_served=bits.served(checkpoint),
        layers=layers,
        notes=[*notes, *_notes(plain, precision)],
    )


def _config_groups(draft: Draft, precision: Precision) -> dict[str, QuantizationScheme]:
    names = defaultdict[int | None, list[str]](list)
    for layer in draft.targets:
        names[precision.group_of(layer.base.in_features)].append(layer.name)
    return {f"group_{index}": precision.scheme(*group) for index, group in enumerate(names.items())}


def _plain(model: PreTrainedModel, weights: dict[str, Tensor], precision: Precision) -> PreTrainedModel:
    """The model with plain layers of those weights, in float32, which holds every product of an integer and a scale."""
    for name, weight in weights.items():
        quantized: Any = model.get_submodule(name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=quantized.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), quantized.bias
        if precision.activations is not None:
            inputs = precision.scheme(None, []).input_activations
            linear.register_forward_pre_hook(partial(_round_inputs, inputs))
        model.set_submodule(name, linear)
    vars(model).pop("save_pretrained")  # llm-compressor's, which would look for quantized layers
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain: PreTrainedModel = model.float().eval()
    return plain


def _round_inputs(precision: QuantizationArgs, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    scale, zero_point = compute_dynamic_scales_and_zp(args[0], precision, module)
    return fake_quantize(args[0], scale, zero_point, precision), *args[1:]


def _notes(model: PreTrainedModel, precision: Precision) -> list[str]:
    notes = []
    groups = Counter(precision.group_of(size.columns) for size in bits.sizes(model))
    if set(groups) != {precision.group}:
        parts = [f"{'whole rows' if group is None else group} in {count} layers" for group, count in groups.items()]
        notes.append(f"groups of {precision.group} do not divide the inputs of every layer: {', '.join(parts)}")
    if precision.activations is not None:
        notes.append(f"activations are rounded to {precision.activations} bits in evaluation, as they are when served")
    return notes
