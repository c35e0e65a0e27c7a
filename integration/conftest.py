import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For modules that run tiny models, where more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
