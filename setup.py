"""The C++ modules `htfkernels._C` and `htfkernels._plan`; everything else about the package is in
pyproject.toml."""

import os
from glob import glob

import pybind11
from setuptools import Extension, setup

plan = Extension(
    name="htfkernels._plan",
    sources=sorted(glob("csrc/plan/*.cpp")),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    language="c++",
)
extension = {
    "name": "htfkernels._C",
    "sources": sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(plan.sources)),
    "depends": sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)),
    "include_dirs": [os.path.abspath("csrc")],  # ninja compiles in another folder
    "py_limited_api": True,
}

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError:
    # Metadata and source archives need no PyTorch; _build_backend refuses to build a wheel without.
    ext_modules, cmdclass = [Extension(**extension), plan], {}
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
    ext_modules = [CppExtension(**extension, extra_compile_args=compile_args), plan]
    cmdclass = {"build_ext": BuildExtension}

setup(ext_modules=ext_modules, cmdclass=cmdclass)
