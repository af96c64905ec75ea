"""The compiled modules; everything else about the package is in pyproject.toml.

``htfkernels._C`` (CPU operators) and ``htfkernels._plan`` are always built. ``htfkernels._C_cuda``
(CUDA operators) is built where PyTorch is a CUDA build and nvcc is there. From the environment:

    CUDA_HOME             where the CUDA toolkit is
    HTF_BUILD_CUDA        1: _C_cuda whatever PyTorch is; 0: without it
    TORCH_CUDA_ARCH_LIST  GPU architectures, as for PyTorch's own extensions; by default
                          "8.0;9.0+PTX"
    MAX_JOBS              how many files are compiled at a time
    HTF_CXX_FLAGS         further flags for the C++ of the CPU modules (bench/sanitize.sh)
    HTF_EMULATE_CUDA      1: htfkernels._C_emulated too, the CUDA operators on the CPU, for tests
"""

import copy
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pybind11
from setuptools import Extension, setup


def is_set(name):
    return os.environ.get(name, "").lower() in ("1", "true", "on", "yes", "y")


def cuda_home():
    """The folder of the CUDA toolkit, or None."""

    def complete(home):
        return all(map(os.path.exists, (f"{home}/bin/nvcc", f"{home}/include/cuda.h")))

    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        if not complete(named):
            raise SystemExit(f"CUDA_HOME is {named}, and there is no bin/nvcc with include/cuda.h")
        return named
    found = shutil.which("nvcc")
    # The nvcc on the PATH may be a script or a link: the toolkit is where its headers are.
    beside = os.path.dirname(os.path.dirname(os.path.realpath(found))) if found else ""
    return next((home for home in (beside, "/usr/local/cuda") if complete(home)), None)


def cuda_wanted(torch_version, torch_cuda):
    """The folder of the CUDA toolkit or None, and why ``_C_cuda`` is built or not."""
    asked = os.environ.get("HTF_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"HTF_BUILD_CUDA: expected 1 or 0, got {asked!r}")
    if asked == "0":
        return None, "HTF_BUILD_CUDA=0"
    if not asked and torch_cuda is None:
        return None, (f"PyTorch {torch_version} is not a CUDA build (HTF_BUILD_CUDA=1 asks for it)")
    home = cuda_home()
    if home is None and asked:
        raise SystemExit(
            "HTF_BUILD_CUDA=1 asks for the CUDA kernels, and no CUDA toolkit was found: CUDA_HOME "
            "must name a folder with bin/nvcc and include/cuda.h"
        )
    if home is None:
        return None, "no nvcc was found (CUDA_HOME says where the CUDA toolkit is)"
    return home, "HTF_BUILD_CUDA=1" if asked else f"PyTorch {torch_version} is a CUDA build"


def architectures():
    """``[("80", False), ("90", True)]``: GPU architectures, and whether as PTX too."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
    found = []
    for name in listed.replace(" ", ";").split(";"):
        number, plus, ptx = name.partition("+")
        if not name:
            continue
        if not number.rstrip("af").replace(".", "").isdigit() or (plus and ptx != "PTX"):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got {listed!r}"
            )
        if float(number.rstrip("af")) >= 8:
            found.append((number.replace(".", ""), bool(ptx)))
    if not found:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need 8.0 or later, got {listed!r}; "
            "HTF_BUILD_CUDA=0 builds without them"
        )
    return found


def nvcc_flags(archs):
    flags = []
    for number, ptx in archs:
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def drop_stale(folder, sources, included):
    """Deletes the objects of sources that are older than a file they may include, so that they are
    compiled again.

    PyTorch without CUDA does not tell ninja what a .cu includes.
    """
    newest = max(map(os.path.getmtime, included))
    for source in sources:
        path = os.path.join(folder, os.path.splitext(source)[0])
        for built in (f"{path}.o", f"{path}_cuda.o"):  # the second beside a .cpp of the same name
            if os.path.exists(built) and os.path.getmtime(built) < newest:
                os.remove(built)


more_flags = shlex.split(os.environ.get("HTF_CXX_FLAGS", ""))
plan = Extension(
    name="htfkernels._plan",
    sources=sorted(glob("csrc/plan/*.cpp")),
    depends=sorted([*glob("csrc/*.h"), *glob("csrc/*.inl"), *glob("csrc/plan/*.h")]),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=[
        *("-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *more_flags,
    ],
    extra_link_args=["-pthread"],
    language="c++",
)
# A unit includes the sources that are compiled together: of a small source, PyTorch's headers take
# most of the time. No two modules may have object files of the same name.
units, cuda_units = sorted(glob("csrc/units/*.cpp")), sorted(glob("csrc/units/cuda/*.cu"))
common = {
    "depends": sorted(
        path
        for end in ("h", "inl", "cuh", "cpp", "cu")
        for path in glob(f"csrc/**/*.{end}", recursive=True)
    ),
    "include_dirs": [os.path.abspath("csrc")],  # ninja compiles in another folder
    "py_limited_api": True,
}
extension = {
    "name": "htfkernels._C",
    "sources": sorted(units + glob("csrc/cpu/kernels*.cpp")),
    **common,
}

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    # Metadata and source archives need no PyTorch; _build_backend refuses to build a wheel without.
    ext_modules, cmdclass = [plan, Extension(**extension)], {}
else:
    cxx_args = [
        "-O3",
        "-g0",
        "-std=c++20",
        # The strict C++ modes turn fused multiply-adds off, and a GEMM lives by them.
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    shared_args = [
        # Only what PyTorch 2.11 has, so that one binary loads under every release since.
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        # As system headers, PyTorch's own do not take part in the warnings.
        *(part for path in cpp_extension.include_paths() for part in ("-isystem", path)),
    ]
    compile_args = cxx_args + shared_args
    cpu_args = compile_args + more_flags
    ext_modules = [plan, cpp_extension.CppExtension(**extension, extra_compile_args=cpu_args)]
    home, why = cuda_wanted(torch.__version__, torch.version.cuda)
    compiled = "htfkernels: compiling _C, _plan (CPU)"
    if home is None:
        compiled += f"; without _C_cuda: {why}"
    else:
        archs = architectures()
        named = ";".join(number + ("+PTX" if ptx else "") for number, ptx in archs)
        compiled += f"; _C_cuda (CUDA, {named}): {why}"
        cuda_args = [
            "-O3",
            "-std=c++20",
            "--expt-relaxed-constexpr",
            "-Xcompiler",
            "-fvisibility=hidden,-Wall",
            # Machine code is packed as PTX is: a third of the size.
            "-Xfatbin",
            "-compress-all",
            f'-DHTF_ARCHITECTURES="{named}"',
            *nvcc_flags(archs),
            *shlex.split(os.environ.get("HTF_NVCC_FLAGS", "")),
        ]
        # PyTorch looks for the toolkit only where it was built with CUDA itself.
        cpp_extension.CUDA_HOME = home
        ext_modules.append(
            cpp_extension.CppExtension(
                name="htfkernels._C_cuda",
                sources=cuda_units,
                **common,
                extra_compile_args={"cxx": compile_args, "nvcc": cuda_args + shared_args},
                # The runtime goes into the module: it loads where there is no CUDA.
                extra_link_args=[
                    # What is linked in, libstdc++ with some compilers, does not meet that of other
                    # modules: exceptions ended a process there.
                    "-Wl,--exclude-libs,ALL",
                    f"-L{home}/lib64",
                    f"-L{home}/lib",
                    "-lcudart_static",
                    "-ldl",
                    "-lrt",
                    "-pthread",
                ],
            )
        )
    if is_set("HTF_EMULATE_CUDA"):
        compiled += "; _C_emulated: HTF_EMULATE_CUDA=1"
        # A GPU ends a kernel that loads a vector from an address that is no multiple of its size.
        checks = ["-fsanitize=alignment,shift", "-fno-sanitize-recover=all"]
        ext_modules.append(
            cpp_extension.CppExtension(
                name="htfkernels._C_emulated",
                sources=sorted(glob("csrc/emulated/*.cpp")),
                **common,
                extra_compile_args=[
                    *compile_args,
                    "-DHTF_EMULATE",
                    "-O1",
                    "-Wno-unknown-pragmas",
                    *checks,
                    *shlex.split(os.environ.get("HTF_EMULATE_FLAGS", "")),
                ],
                extra_link_args=checks,
            )
        )

    class Build(cpp_extension.BuildExtension):
        planned = None  # the build of plan, where it runs beside the others

        def build_extensions(self):
            print(compiled, flush=True)
            included = [path for path in common["depends"] if not path.endswith("cpp")]
            drop_stale(self.build_temp, cuda_units, included)
            with ThreadPoolExecutor(1) as self.beside:
                super().build_extensions()
            if self.planned is not None:
                self.planned.result()

        def build_extension(self, ext):
            if ext is not plan or os.environ.get("MAX_JOBS") == "1":
                super().build_extension(ext)
                return
            # A single file, which keeps one core busy: meanwhile the others compile _C. ninja has a
            # folder for each run.
            own = copy.copy(self)
            own.build_temp = os.path.join(self.build_temp, "plan")
            self.planned = self.beside.submit(super(Build, own).build_extension, ext)

    cmdclass = {"build_ext": Build}

setup(ext_modules=ext_modules, cmdclass=cmdclass)
