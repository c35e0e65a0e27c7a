"""The arguments that a pipeline takes of its task."""

from typing import Any

from efx_plugin.errors import UsageError
from efx_plugin.evaluate.pipelines.protocol import PipelineTask


def take_arguments(task: PipelineTask, **defaults: Any) -> dict[str, Any]:
    """The arguments of a task, with defaults for those that it does not give.

    Raises:
        UsageError: an argument that is not among the defaults.
    """
    for name in task.arguments:
        if name not in defaults:
            known = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
            raise UsageError(f"the pipeline has no argument {name!r}: {known}")
    return defaults | task.arguments
