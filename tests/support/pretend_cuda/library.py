"""The C++ part: compiled once for the installed PyTorch, and loaded before it. Imports no PyTorch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """A C++ compiler of this machine."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def build(folder: Path) -> Path:
    """The library in this folder, compiled if it is not there.

    Raises:
        RuntimeError: no compiler, or it fails; with its first words.
    """
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    target = folder / f"pretend_cuda-{key}.so"
    if target.exists():
        return target
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    torch = _torch()
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        command = [cxx, *flags, str(SOURCE), "-lc10", "-ltorch_cpu", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise RuntimeError(f"{cxx} cannot compile it: {done.stderr[:400]}")
        made.replace(target)  # whole, or not at all
    return target


def load(library: Path) -> None:
    """Load it. Hooks that come after PyTorch's import are not looked at."""
    if "torch" in sys.modules:
        raise RuntimeError("PyTorch has been imported before its hooks")
    lib = _torch() / "lib"
    for path in (lib / "libc10.so", lib / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("PyTorch is not installed")
    return Path(spec.origin).parent
