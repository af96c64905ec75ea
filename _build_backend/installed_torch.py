"""setuptools as a PEP 517 backend that compiles against the PyTorch already installed.

With torch among the build requirements pip would download another PyTorch, of several GB, into its
isolated build environment, and compile against that one instead of the one the user runs.
"""

import importlib
import runpy
import shutil
import site
import sys
import sysconfig
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

MINIMUM = (2, 11)


def _use_installed_torch():
    """Makes torch importable, without importing it: that takes seconds, and pip asks for each step
    in a process of its own."""
    if find_spec("torch") is None:
        # pip's build isolation hides these folders. At the end of the path, they in turn hide
        # nothing of the build environment.
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        sys.path += [path for path in [*paths, *site.getsitepackages()] if path not in sys.path]
        importlib.invalidate_caches()
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        _refuse("none was found")
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"]
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        _refuse(f"{version} was found")


def _refuse(found):
    # SystemExit: pip then shows these lines alone, without a traceback.
    raise SystemExit(
        f"htfkernels is compiled against the installed PyTorch, and {found} in {sys.prefix}.\n"
        f"It needs {'.'.join(map(str, MINIMUM))} or newer: install it first, for example with "
        "`pip install torch==2.13.0`, then run this command again.\n"
        "(Front ends other than pip also need build isolation turned off.)"
    )


def get_requires_for_build_wheel(config_settings=None):
    _use_installed_torch()  # before pip downloads what the package requires, torch among it
    return []


def get_requires_for_build_editable(config_settings=None):
    _use_installed_torch()  # before pip downloads what the package requires, torch among it
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    # Everything in here goes into the wheel, modules since deleted from the source included.
    for stale in glob("build/lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
