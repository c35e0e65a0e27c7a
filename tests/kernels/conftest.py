"""The tests of kernels choose them by themselves, whatever the environment forces."""

import platform
import shutil

import pytest

from efx_plugin.kernels import native
from tests.support.native_calls import ARM64, PORTABLE, ROOT, X86, compile_replay


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("EFX_KERNEL", raising=False)


@pytest.fixture(scope="session")
def sanitized_program(tmp_path_factory):
    """The program of native_replay.cpp under sanitizers, its tiles emulated: they see no loads and stores of real ones.

    Arrays on the stack are left to the bounds check of UBSan, and of the loops that are unrolled for vectors a few
    checks that plain C++ gets suffice: with all of them, g++ takes minutes for those files.
    """
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("needs the sanitizers of g++ on Linux")
    names = [kernel.name for kernel in native.KERNELS]
    architecture = X86 if "avx2" in names else ARM64 if "neon" in names else PORTABLE
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param", "asan-stack=0"]
    fewer = ["-fno-sanitize=null,object-size,alignment", "--param", "asan-instrumentation-with-call-threshold=0"]
    tiles = f'-DEFX_EMULATE_TILES="{ROOT / "tests" / "kernels" / "emulated_tiles.hpp"}"'
    return compile_replay(tmp_path_factory.mktemp("replay"), compiler, architecture, [*sanitizers, tiles], fewer)
