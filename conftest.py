"""What holds for all tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def environment():
    """A command that a test runs in this process sets variables for all it imports: later tests do not inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
