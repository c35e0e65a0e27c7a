"""A pipeline that is a function in a module of this package, imported when it runs: such modules import torch."""

from collections.abc import Callable
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

    def prepare(self) -> None:
        """See `Pipeline.prepare`."""
        self._load()

    def run(self, task: PipelineTask) -> PipelineResult:
        """See `Pipeline.run`."""
        return self._load()(task)

    def _load(self) -> Callable[[PipelineTask], PipelineResult]:
        module, _, name = self.function.partition(".")
        function: Callable[[PipelineTask], PipelineResult] = getattr(
            import_module(f"efx_plugin.evaluate.pipelines.{module}"), name
        )
        return function
