"""A pipeline that is a function in a module of this package, imported when it runs: such modules import torch."""

from dataclasses import dataclass
from importlib import import_module

from efx_plugin.evaluate.pipelines.protocol import Family, PipelineResult, PipelineTask


@dataclass(frozen=True)
class Lazy:
    """A pipeline, see `Pipeline`.

    Attributes:
        function: MODULE.FUNCTION, which makes a `PipelineResult` of a `PipelineTask`.
    """

    name: str
    family: Family
    function: str
    ours: bool = False
    needs_adapter: bool = True
    needs_training: bool = False
    groups: tuple[int, ...] = ()

    def run(self, task: PipelineTask) -> PipelineResult:
        """See `Pipeline.run`."""
        module, _, function = self.function.partition(".")
        result: PipelineResult = getattr(import_module(f"efx_plugin.evaluate.pipelines.{module}"), function)(task)
        return result
