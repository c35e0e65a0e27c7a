"""Builds the compiled parts and lists the packages; everything else about the package is in pyproject.toml.

They are optional: where no C++ compiler is found, the package installs without them and says so when it is used.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

CHECKPOINT = "efx_plugin/checkpoint/codec/native"
KERNELS = "efx_plugin/kernels/native"
COMPILE = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
COMPILE += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own headers of intrinsics set these off

# Each of these files is compiled for its instructions and entered only on a processor that has them.
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
_AVX512_BF16 = [*_AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mavx512bf16"]
_X86 = {
    f"{CHECKPOINT}/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vbmi2"],
    f"{KERNELS}/avx512_bf16.cpp": _AVX512_BF16,
    f"{KERNELS}/amx.cpp": _AVX512_BF16,
    f"{KERNELS}/avx512_vnni.cpp": [*_AVX512, "-mbmi2", "-mavx512vnni"],
    f"{KERNELS}/avx512.cpp": [*_AVX512, "-mbmi2"],
    f"{KERNELS}/avx2.cpp": ["-mavx2", "-mfma"],
}
_ARM64 = {
    f"{KERNELS}/neon_bf16.cpp": ["-march=armv8.2-a+dotprod+bf16"],
    f"{KERNELS}/neon.cpp": ["-march=armv8-a"],
}
MACRO, INSTRUCTIONS = {
    "x86_64": ("EFX_WITH_X86", _X86),
    "amd64": ("EFX_WITH_X86", _X86),
    "aarch64": ("EFX_WITH_ARM64", _ARM64),
    "arm64": ("EFX_WITH_ARM64", _ARM64),
}.get(platform.machine().lower(), (None, {}))


class BuildLibraries(build_ext):
    """Compiles file by file, each with its own instruction set, into shared libraries.

    A library in the tree that is newer than all it is made of, left there by an editable install, is taken as it is.
    """

    def build_extension(self, extension: Extension) -> None:
        path = self.get_ext_fullpath(extension.name)
        built = self.get_ext_filename(extension.name)
        if not self.force and not newer_group([*extension.sources, *extension.depends, "setup.py"], built):
            self.mkpath(os.path.dirname(path))
            self.copy_file(built, path)
            return

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=extension.define_macros,
                extra_postargs=[*extension.extra_compile_args, *INSTRUCTIONS.get(source, [])],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, extension.sources) for name in names]
        self.compiler.link_shared_object(
            objects, path, extra_postargs=extension.extra_link_args, build_temp=self.build_temp, target_lang="c++"
        )


def library(name: str, folder: str, sources: list[str], flags: list[str]) -> Extension:
    """A shared library of C++ files, with those of the folder for this architecture's instructions."""
    paths = [path for path in INSTRUCTIONS if os.path.dirname(path) == folder]  # first, for they take longest
    return Extension(
        name,
        sources=[*paths, *(f"{folder}/{source}" for source in sources)],
        depends=glob(f"{folder}/*.hpp"),
        define_macros=[("Py_LIMITED_API", "0x030B0000"), *([(MACRO, None)] if MACRO else [])],
        extra_compile_args=[*COMPILE, *flags],
        extra_link_args=flags,
        language="c++",
        optional=True,
        py_limited_api=True,
    )


setup(
    # optimum-cli finds further commands in the namespace optimum.commands.register.
    packages=[
        *find_packages(include=["efx_plugin", "efx_plugin.*"]),
        "efx_plugin.recipes",
        "optimum.commands.register",
    ],
    package_dir={"efx_plugin.recipes": "recipes", "optimum.commands.register": "efx_plugin/optimum_cli"},
    package_data={
        "efx_plugin": ["py.typed", "kernels/cuda/*.cu", "kernels/cuda/*.cuh"],
        "efx_plugin.evaluate.paper_tasks": ["*.yaml"],
        "efx_plugin.evaluate.tasks": ["*.yaml"],
        "efx_plugin.recipes": ["*.yaml"],
    },
    cmdclass={"build_ext": BuildLibraries},
    options={
        "bdist_wheel": {"py_limited_api": "cp311"},  # one wheel for Python 3.11 and later
        "build_ext": {"parallel": True},  # both libraries at once, so that neither's last file leaves a core idle
    },
    ext_modules=[
        library(
            "efx_plugin.checkpoint.codec.native._bits",
            CHECKPOINT,
            ["entry.cpp", "portable.cpp"],
            flags=[],
        ),
        library(
            "efx_plugin.kernels.native._linear",
            KERNELS,
            ["binding.cpp", "entry.cpp", "portable.cpp"],
            flags=["-fopenmp"],
        ),
    ],
)
