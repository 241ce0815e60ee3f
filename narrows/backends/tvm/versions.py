"""Which TVM the backend works with. Importing this imports neither TVM nor torch."""

from __future__ import annotations

import importlib.metadata

TVM, FFI = "apache-tvm", "apache-tvm-ffi"

# TVM's Python API moves with every release, and its wheel admits versions of the FFI under which
# it crashes: 0.1.15.post1 and post2 when a module is written as JSON.
WANTED = {TVM: "0.27.0.post1", FFI: "0.1.14.post1"}

INSTALL = f"pip install {' '.join(f'{name}=={version}' for name, version in WANTED.items())}"


def installed(name: str) -> str:
    """Return the installed version of a package, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def problem() -> str:
    """Return what is missing or wrong, with what to do about it; empty where all is well."""
    found = {name: installed(name) for name in WANTED}
    absent = [name for name, version in found.items() if not version]
    if absent:
        return f"it needs {' and '.join(absent)}: {INSTALL}"
    wrong = [f"{n} {v} is installed" for n, v in found.items() if v != WANTED[n]]
    if wrong:
        return f"{' and '.join(wrong)}, with which it crashes or fails: {INSTALL}"
    return ""
