from collections.abc import Callable

import pytest

from efx_plugin.kernels.cuda.variants import Variant
from tests.support.emulated_gpu import EmulatedGpu


@pytest.fixture(scope="session")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], EmulatedGpu]:
    """The emulated kernels of a variant, compiled once."""
    compiled: dict[Variant, EmulatedGpu] = {}

    def find(variant: Variant) -> EmulatedGpu:
        if variant not in compiled:
            compiled[variant] = EmulatedGpu(variant, tmp_path_factory.mktemp("emulated"))
        return compiled[variant]

    return find
