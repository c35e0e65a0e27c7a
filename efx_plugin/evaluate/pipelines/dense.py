"""The dense models that everything is measured against: the base model, and the base model with its adapter."""

from efx_plugin.evaluate.pipelines.protocol import Family, PipelineResult, PipelineTask


class Dense:
    """The model as it is stored, with the adapter merged in or without."""

    family: Family = "dense"
    ours = False
    needs_training = False
    groups: tuple[int, ...] = ()

    def __init__(self, name: str, *, needs_adapter: bool) -> None:
        self.name = name
        self.needs_adapter = needs_adapter

    def prepare(self) -> None:
        """See `Pipeline.prepare`."""
        import efx_plugin.model.loading  # noqa: F401

    def run(self, task: PipelineTask) -> PipelineResult:
        """See `Pipeline.run`; the merge is computed in float32 and rounded to the stored dtype once."""
        from efx_plugin.engine.compute_dtype import stored_dtype
        from efx_plugin.model.loading import inspect_sources

        model = inspect_sources(task.model, task.adapter if self.needs_adapter else None).load_merged()
        dtype, _ = stored_dtype((tensor.dtype, tensor.numel()) for tensor in model.parameters())
        bits = float(8 * dtype.itemsize)
        return PipelineResult(model, 0.0, bits, bits)
