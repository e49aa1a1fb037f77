"""The check's build of the native module, where there is a compiler and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tools.gpu_check import build
from tools.gpu_check.places import ROOT


def test_the_native_module_is_built_by_a_compiler_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a module of one function in the place of ours, which takes a minute."""
    source = tmp_path / "module.cpp"
    source.write_text(
        '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_ch16, m) { m.def("answer", [] { return 42; }); }\n'
    )
    monkeypatch.setattr(build, "sources", lambda: [source])
    made = build.build_native(tmp_path / "native", with_cmake=False)
    code = f"import sys; sys.path.insert(0, {str(made.parent)!r}); import _ch16; print(_ch16.answer())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "42\n"
    )
    written = made.stat().st_mtime_ns
    monkeypatch.setattr(build, "is_current", lambda module: module.exists())
    assert build.build_native(tmp_path / "native", with_cmake=False).stat().st_mtime_ns == written
    source.write_text("this is no C++")
    made.unlink()
    with pytest.raises(build.BuildFailed, match=r"module\.cpp"):
        build.build_native(tmp_path / "native", with_cmake=False)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.BuildFailed, match=r"no C\+\+ compiler: .*/nowhere/c"):
        build.build_native(tmp_path / "native", with_cmake=False)


def test_all_sources_are_built() -> None:
    """Those that CMake's target is made of."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    core = text[
        text.index("add_library(nanoserve_core") : text.index("target_include_directories(nanoserve_core")
    ]
    module = text[text.index("pybind11_add_module") : text.index("set_target_properties(ch16")]
    listed = {
        line.strip().rstrip(")") for line in (core + module).splitlines() if line.strip().startswith("src/")
    }
    assert {str(path.relative_to(ROOT)) for path in build.sources()} == listed
    assert (build.pybind11_headers() / "pybind11" / "numpy.h").is_file()
