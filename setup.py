"""The C++ module `htfkernels._C`; everything else about the package is in pyproject.toml."""

import os
from glob import glob

from setuptools import Extension, setup

extension = {
    "name": "htfkernels._C",
    "sources": sorted(glob("csrc/**/*.cpp", recursive=True)),
    "depends": sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)),
    "include_dirs": [os.path.abspath("csrc")],  # ninja compiles in another folder
    "py_limited_api": True,
}

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError:
    # Metadata and source archives need no PyTorch; _build_backend refuses to build a wheel without.
    ext_modules, cmdclass = [Extension(**extension)], {}
else:
    compile_args = [
        "-O3",
        "-g0",
        "-std=c++20",
        # The strict C++ modes turn fused multiply-adds off, and a GEMM lives by them.
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        # Only what PyTorch 2.11 has, so that one binary loads under every release since.
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        # As system headers, PyTorch's own do not take part in the warnings.
        *(f"-isystem{path}" for path in include_paths()),
    ]
    ext_modules = [CppExtension(**extension, extra_compile_args=compile_args)]
    cmdclass = {"build_ext": BuildExtension}

setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
