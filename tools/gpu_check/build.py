"""Builds the native module where the GPU is: with CMake if it is there, else by calling the C++ compiler on each file."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gpu_check.places import ROOT

_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")


class BuildFailed(RuntimeError):
    """With the compiler's last words."""


def sources() -> list[Path]:
    return sorted([*(ROOT / "src").glob("*.cpp"), *(ROOT / "src" / "bind").glob("*.cpp")])


def is_current(module: Path) -> bool:
    """Whether a module is newer than everything it is built from."""
    headers = [*(ROOT / "src").glob("*.h"), *(ROOT / "src" / "bind").glob("*.h")]
    return module.exists() and all(
        path.stat().st_mtime < module.stat().st_mtime for path in [*sources(), *headers]
    )


def build_native(folder: Path, with_cmake: bool = True) -> Path:
    """The module's file.

    Raises:
        BuildFailed: neither way works.
    """
    module = folder / f"_ch16{_SUFFIX}"
    if is_current(module):
        return module
    folder.mkdir(parents=True, exist_ok=True)
    if with_cmake and shutil.which("cmake") and importlib.util.find_spec("pybind11"):
        made = _by_cmake(folder)
        if made is not None:
            return made
    return _by_compiler(module)


def _by_cmake(folder: Path) -> Path | None:
    """None where it does not get through: then the compiler by itself may."""
    made = folder / "cmake"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(made), f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release", "-DNANOSERVE_FETCH_PYBIND11=OFF",
    ]  # fmt: skip
    compile_all = ["cmake", "--build", str(made), "--target", "ch16", "--parallel", str(_jobs())]
    for command in (configure, compile_all):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"cmake: {(done.stdout + done.stderr)[-800:]}", flush=True)
            return None
    return made / f"_ch16{_SUFFIX}"


def _by_compiler(module: Path) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++") or "clang++"
    ]
    includes = [f"-I{path}" for path in (ROOT / "src", sysconfig.get_path("include"), pybind11_headers())]
    objects = [module.parent / f"{path.parent.name}_{path.stem}.o" for path in sources()]

    def compile_one(source: Path, to: Path) -> None:
        _run([*compiler, *_FLAGS, *includes, "-c", str(source), "-o", str(to)])

    with ThreadPoolExecutor(_jobs()) as pool:
        for _ in pool.map(compile_one, sources(), objects):
            pass
    part = module.with_suffix(".part")
    _run([*compiler, "-shared", "-o", str(part), *map(str, objects), "-pthread", "-ldl"])
    os.replace(part, module)
    return module


def pybind11_headers() -> Path:
    """pybind11's own, or those that PyTorch carries.

    Raises:
        BuildFailed: neither is installed.
    """
    for package in ("pybind11", "torch"):
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or []) if found is not None else []:
            if (Path(place) / "include" / "pybind11" / "pybind11.h").is_file():
                return Path(place) / "include"
    raise BuildFailed("pybind11's headers: neither pybind11 nor torch is installed")


def _jobs() -> int:
    return len(os.sched_getaffinity(0))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BuildFailed(f"no C++ compiler: {error}") from error
    if done.returncode != 0:
        raise BuildFailed(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
