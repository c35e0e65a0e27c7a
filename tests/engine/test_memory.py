import sys
from pathlib import Path

import pytest
import torch

from efx_plugin.engine.memory import return_freed_memory


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_holes_between_what_lives_on_go_back_to_the_system():
    pieces = [torch.ones(25_000) for _ in range(2000)]
    survivors = pieces[::50]
    del pieces
    held = resident()
    return_freed_memory()
    assert resident() < held - 100e6
    assert all((survivor == 1).all() for survivor in survivors)
