"""What the CUDA driver is asked for, through the real cuda.bindings and a stub in the driver's place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CC = shutil.which("gcc")
STUB = Path(__file__).with_name("driver_stub.c")
SCRIPT = """
import torch
from efx_plugin.kernels.cuda.driver import Function
tensor = torch.zeros(4)
print(hex(tensor.data_ptr()))
function = Function(b"\\x7fELF...", "efx", 70_000, 3)
for stream in (0, 0xABC):
    function.launch(12, 256, 69_632, stream, [tensor, None, 2**31 - 1, -5])
"""

pytestmark = pytest.mark.skipif(CC is None, reason="needs gcc")


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The folder that holds the stub."""
    folder = tmp_path_factory.mktemp("driver")
    command = [CC, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", STUB, "-o", folder / "libcuda.so.1", "-ldl"]
    subprocess.run(command, check=True)
    return folder


def run(driver: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)} | environment
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)


def test_a_function_is_loaded_with_its_shared_memory_and_launched_with_its_arguments(driver):
    result = run(driver)
    assert result.returncode == 0, result.stderr
    address, *calls = result.stdout.splitlines()
    assert calls == [
        "retain 3",
        "load \x7fELF in 0xc0",
        "function 0x11 efx",
        "set 0x22 8 70000",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        "get 0x22 4",  # CU_FUNC_ATTRIBUTE_NUM_REGS
        "current 0xc0",  # of a thread that had no context
        f"launch 0x22 12,1,1 256,1,1 69632 (nil) {address} (nil) 2147483647 -5 (nil)",
        f"launch 0x22 12,1,1 256,1,1 69632 0xabc {address} (nil) 2147483647 -5 (nil)",
    ]


@pytest.mark.parametrize("function", ["cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuLaunchKernel"])
def test_what_the_driver_refuses_is_an_error(driver, function):
    result = run(driver, STUB_REFUSES=function)
    assert result.returncode != 0
    assert result.stderr.endswith(f"the CUDA driver answers {function} with CUDA_ERROR_OUT_OF_MEMORY\n")
