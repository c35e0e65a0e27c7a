import pytest
import torch
from loguru import logger


@pytest.fixture(scope="module")
def one_thread():
    """For modules that run tiny models, where more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that the log got, in order."""
    messages = []
    monkeypatch.setattr(logger, "warning", messages.append)
    return messages
