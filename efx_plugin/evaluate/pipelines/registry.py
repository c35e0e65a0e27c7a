"""The pipelines that there are, in the order of the table."""

from efx_plugin.evaluate.pipelines.dense import Dense
from efx_plugin.evaluate.pipelines.protocol import Pipeline

_ALL: tuple[Pipeline, ...] = (
    Dense("base", needs_adapter=False),
    Dense("lora", needs_adapter=True),
)

PIPELINES: dict[str, Pipeline] = {pipeline.name: pipeline for pipeline in _ALL}
