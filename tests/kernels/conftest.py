"""The tests of kernels choose them by themselves, whatever the environment forces."""

import pytest


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("EFX_KERNEL", raising=False)
