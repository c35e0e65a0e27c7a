"""Builds the compiled parts and lists the packages; everything else about the package is in pyproject.toml.

They are optional: where no C++ compiler is found, the package installs without them and says so when it is used.
"""

import platform

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CHECKPOINT = "efx_plugin/checkpoint/native"
COMPILE = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
IS_X86 = platform.machine() in ("x86_64", "AMD64")

# Each of these files is compiled for its instructions and entered only on a processor that has them.
INSTRUCTIONS = {f"{CHECKPOINT}/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vbmi2"]} if IS_X86 else {}


class BuildLibraries(build_ext):
    """Compiles file by file, each with its own instruction set, into shared libraries that ctypes loads."""

    def build_extension(self, extension: Extension) -> None:
        objects = []
        for source in extension.sources:
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=extension.define_macros,
                extra_postargs=[*extension.extra_compile_args, *INSTRUCTIONS.get(source, [])],
            )
        path = self.get_ext_fullpath(extension.name)
        self.compiler.link_shared_object(objects, path, build_temp=self.build_temp, target_lang="c++")


setup(
    # optimum-cli finds further commands in the namespace optimum.commands.register.
    packages=[*find_packages(include=["efx_plugin", "efx_plugin.*"]), "optimum.commands.register"],
    package_dir={"optimum.commands.register": "efx_plugin/optimum_cli"},
    cmdclass={"build_ext": BuildLibraries},
    ext_modules=[
        Extension(
            "efx_plugin.checkpoint.native._bits",
            sources=[f"{CHECKPOINT}/entry.cpp", f"{CHECKPOINT}/portable.cpp", *INSTRUCTIONS],
            depends=[f"{CHECKPOINT}/{name}.hpp" for name in ("bits", "rows")],
            define_macros=[("EFX_WITH_AVX512", None)] if IS_X86 else [],
            extra_compile_args=COMPILE,
            language="c++",
            optional=True,
        )
    ],
)
