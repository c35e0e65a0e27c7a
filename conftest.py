"""What holds for all tests."""

import os

import hypothesis
import pytest

# No test is timed: on a busy machine the first example, which waits for imports, would fail.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def environment():
    """A command that a test runs in this process sets variables for all it imports: later tests do not inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
