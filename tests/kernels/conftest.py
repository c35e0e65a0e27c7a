"""The tests of kernels choose them by themselves, whatever the environment forces.

They are of the kernels' own products, which many tokens would not meet on a processor with AMX.
"""

import pytest

from efx_plugin.kernels import native
from efx_plugin.kernels.native import hand_off


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("EFX_KERNEL", raising=False)
    for kernel in native.KERNELS:
        monkeypatch.setattr(kernel, "hand_off_from", hand_off.NEVER)
