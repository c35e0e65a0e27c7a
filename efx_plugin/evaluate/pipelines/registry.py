"""The pipelines that there are, in the order of the table."""

from efx_plugin.evaluate.pipelines.dense import Dense
from efx_plugin.evaluate.pipelines.lazy import Lazy
from efx_plugin.evaluate.pipelines.protocol import Pipeline


def _trained(name: str, function: str, *, ours: bool = False) -> Lazy:
    return Lazy(name, "trained", f"trained.{function}", ours=ours, needs_adapter=False, needs_training=True)


_ALL: tuple[Pipeline, ...] = (
    Dense("base", needs_adapter=False),
    Dense("lora", needs_adapter=True),
    Lazy("lora+random", "one-shot", "one_shot.random"),
    Lazy("lora+magnitude", "one-shot", "one_shot.magnitude"),
    Lazy("lora+wanda", "one-shot", "one_shot.wanda"),
    Lazy("lora+sparsegpt", "one-shot", "one_shot.sparsegpt"),
    Lazy("lora+expert", "one-shot", "one_shot.expert", ours=True),
    Lazy("lora+sparsegpt+heal", "healed", "healed.sparsegpt"),
    Lazy("lora+expert+heal", "healed", "healed.expert", ours=True),
    Lazy("lora+w8a8", "quantized", "quantized.w8a8"),
    Lazy("lora+w8a16", "quantized", "quantized.w8a16"),
    Lazy("lora+w4a16", "quantized", "quantized.w4a16"),
    Lazy("lora+w3", "quantized", "quantized.w3", groups=(128, 64, 32)),
    Lazy("lora+expert+w8", "sparse and quantized", "quantized.expert_w8", ours=True),
    Lazy("lora+expert+w4", "sparse and quantized", "quantized.expert_w4", ours=True),
    _trained("wanda+masked-lora", "wanda_then_lora"),
    _trained("sparsegpt+masked-lora", "sparsegpt_then_lora"),
    _trained("published", "published"),
    _trained("as-released", "as_released"),
    _trained("expert", "expert", ours=True),
)

PIPELINES: dict[str, Pipeline] = {pipeline.name: pipeline for pipeline in _ALL}
