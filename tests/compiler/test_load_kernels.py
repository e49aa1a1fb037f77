"""load_kernels over process borders: a warm start compiles nothing, imports no MLIR; every fallback says what it does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanoserve
from compiler.packed_call import call_address
from nanoserve.compiler import bindings, jit, object_cache
from nanoserve.compiler.target import AVX2, host
from nanoserve.kernels import gemm, library, norm
from nanoserve.kernels.library import KernelSpec, load_kernels, stats

PYTHON_PATH = str(Path(nanoserve.__file__).parent.parent)
SPEC = norm.norm_spec("rmsnorm", 20, 20, 20, 1e-5)

# Loads a kernel, runs it, and tells what that took.
PROGRAM = """
import ctypes, json, sys
import numpy as np
{before}
from nanoserve.kernels import norm
from nanoserve.kernels.library import load_kernels, stats
spec = norm.norm_spec("rmsnorm", {cols}, {cols}, {cols}, 1e-5)
progress = []
address = load_kernels([spec, spec], lambda *step: progress.append(step))[spec]
x, w, out = (np.ones((2, {cols}), dtype=np.float32) for _ in range(3))
values = [ctypes.c_void_p(a.ctypes.data) for a in (x, w, out)] + [ctypes.c_int64(0), ctypes.c_int64(2)]
packed = (ctypes.c_void_p * 5)(*(ctypes.addressof(v) for v in values))
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(packed))
assert abs(out - 1).max() < 1e-4, out
s = stats()
mlir = sorted(name for name in sys.modules if name.split(".")[0] in ("mlir", "torch_mlir"))
print(json.dumps(dict(compiled=s.compiled, loaded=s.loaded_from_cache, damaged=s.damaged, mlir=mlir, progress=progress)))
"""


def start(directory: Path, before: str = "", cols: int = 20, **env: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(before=before, cols=cols)
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "NANOSERVE_CACHE_DIR": str(directory), **env}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out)
    return {**result, "stderr": err}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A cache directory with one kernel, filled by another process."""
    cold = finish(start(tmp_path / "cache"))
    assert (cold["compiled"], cold["loaded"]) == (1, 0)
    assert cold["mlir"]
    return tmp_path / "cache"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process, as if it had just started, with an empty cache."""
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_stats", library.Stats())
    return tmp_path / "cache"


def test_a_warm_start_compiles_nothing_and_imports_no_mlir(filled: Path) -> None:
    warm = finish(start(filled))
    assert (warm["compiled"], warm["loaded"], warm["mlir"]) == (0, 1, [])
    assert warm["progress"] == [[1, 1, SPEC.symbol]]


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_a_damaged_entry_is_compiled_again(filled: Path, suffix: str) -> None:
    (path,) = filled.glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-100])
    again = finish(start(filled))
    assert (again["compiled"], again["damaged"]) == (1, 1)
    assert "compiling it again" in again["stderr"]
    assert finish(start(filled))["compiled"] == 0


def test_an_object_that_verifies_but_is_no_library_is_compiled_again(filled: Path) -> None:
    (manifest,) = filled.glob("*.json")
    object_cache.ObjectCache(filled).store(manifest.stem, SPEC.symbol, "compiler", b"not an ELF file")
    assert finish(start(filled))["compiled"] == 1


def test_an_object_without_the_kernel_is_compiled_again(filled: Path) -> None:
    """A library that exports something else must not be called."""
    finish(start(filled, cols=24))
    cache = object_cache.ObjectCache(filled)
    objects = {path.stem: json.loads(path.read_text()) for path in filled.glob("*.json")}
    (ours,) = (key for key, manifest in objects.items() if manifest["symbol"] == SPEC.symbol)
    (other,) = (manifest for manifest in objects.values() if manifest["symbol"] != SPEC.symbol)
    cache.store(ours, SPEC.symbol, "compiler", (filled / f"{other['sha256']}.so").read_bytes())
    assert finish(start(filled))["compiled"] == 1


def test_processes_that_compile_the_same_kernel_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    racing = [start(directory) for _ in range(3)]
    assert all(finish(process)["damaged"] == 0 for process in racing)
    assert len(list(directory.glob("*.json"))) == 1
    assert not list(directory.glob(".new-*"))
    warm = finish(start(directory))
    assert (warm["compiled"], warm["loaded"]) == (0, 1)


NO_BINDINGS = "from nanoserve.compiler import bindings; bindings._PROVIDERS.clear()"


def test_a_warm_cache_needs_no_bindings(filled: Path) -> None:
    warm = finish(start(filled, before=NO_BINDINGS))
    assert (warm["compiled"], warm["loaded"], warm["mlir"]) == (0, 1, [])


def test_without_bindings_a_miss_says_what_to_install(filled: Path) -> None:
    process = start(filled, before=NO_BINDINGS, cols=28)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "MlirMissing" in err
    assert 'pip install "torch-mlir>=20261001"' in err
    assert "everything still runs from a kernel cache" in err
    assert issubclass(bindings.MlirMissing, ImportError)


def test_a_folder_called_mlir_is_not_mistaken_for_the_bindings(tmp_path: Path) -> None:
    (tmp_path / "mlir" / "include").mkdir(parents=True)
    program = "from nanoserve.compiler import bindings; print(bindings.toolchain())"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHON_PATH}"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == bindings.toolchain()
    assert "mlir" in said


def test_an_unsafe_directory_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    process = start(tmp_path / "cache")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "CacheRefused" in err
    assert "lets other users write code" in err


def test_without_a_linker_kernels_run_from_memory(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = finish(start(tmp_path / "cache", PATH=str(empty)))
    assert (result["compiled"], result["loaded"]) == (1, 0)
    assert "stays in memory and is compiled again next time" in result["stderr"]
    assert not list((tmp_path / "cache").glob("*.so"))


def use(address: int) -> None:
    x, w, out = (np.ones((2, 20), dtype=np.float32) for _ in range(3))
    call_address(address, x, w, out, 0, 2)
    assert np.abs(out - 1).max() < 1e-4


def test_the_compiler_driver_stands_in_for_the_linker(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = jit.shutil.which
    if which("cc") is None:
        pytest.skip("no cc installed")
    monkeypatch.setattr(jit.shutil, "which", lambda name: None if name == "ld" else which(name))
    jit.linker.cache_clear()
    try:
        assert jit.linker() == (which("cc"), "-shared", "-nostdlib")
        use(load_kernels([SPEC])[SPEC])
    finally:
        monkeypatch.undo()
        jit.linker.cache_clear()


def test_a_linker_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "linker", lambda: ("/bin/sh", "-c", "echo no room here >&2; exit 3"))
    with pytest.raises(jit.CompileError, match=r"failed with status 3: no room here"):
        load_kernels([SPEC])


def test_counts_progress_and_reuse_in_one_process(fresh: Path) -> None:
    other = norm.norm_spec("rmsnorm", 36, 36, 36, 1e-5)
    steps: list[tuple[int, int, str]] = []
    addresses = load_kernels([SPEC, other, SPEC], lambda *step: steps.append(step))
    assert steps == [(1, 2, SPEC.symbol), (2, 2, other.symbol)]
    assert (stats().compiled, stats().reused_in_process) == (2, 0)
    assert load_kernels([other, SPEC], lambda *step: steps.append(step)) == addresses
    assert len(steps) == 2
    assert (stats().compiled, stats().reused_in_process) == (2, 2)
    for address in addresses.values():
        assert address > 0
    use(addresses[SPEC])


def test_progress_may_load_kernels(fresh: Path) -> None:
    load_kernels([SPEC], lambda *_: load_kernels([]) and None)
    assert stats().compiled == 1


def test_mapped_objects_need_no_text_relocations(fresh: Path) -> None:
    """DT_TEXTREL (tag 22) or DF_TEXTREL would ask for writable code, which hardened systems refuse."""
    load_kernels([gemm.gemm_spec(20, 40, 20, 64)])
    (path,) = fresh.glob("*.so")
    tool = jit.shutil.which("readelf")
    if tool is None:
        pytest.skip("no readelf installed")
    said = subprocess.run([tool, "-d", path], capture_output=True, text=True, check=True).stdout
    assert "HASH" in said
    assert "TEXTREL" not in said


def key_of(spec: KernelSpec, toolchain: str = "t") -> str:
    return spec.key(host(), toolchain)


def test_a_key_covers_what_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [
        SPEC,
        norm.norm_spec("layernorm", 20, 20, 20, 1e-5),
        norm.norm_spec("rmsnorm", 20, 20, 20, 1e-6),
        norm.norm_spec("rmsnorm", 20, 20, 21, 1e-5),
        gemm.gemm_spec(20, 20, 20, 64),
        gemm.gemm_spec(20, 20, 20, 64, residual=True),
    ]
    keys = [key_of(spec) for spec in specs]
    keys += [key_of(SPEC, "another toolchain"), SPEC.key(AVX2, "t")]
    assert len(set(keys)) == len(keys)
    assert len({spec.symbol for spec in specs}) == len(specs)
    assert key_of(SPEC) == key_of(norm.norm_spec("rmsnorm", 20, 20, 20, 1e-5))

    read = Path.read_bytes
    for changed in ("kernels/norm.py", *(f"compiler/{name}" for name in library._COMPILER_SOURCES)):
        library._source_digest.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "read_bytes", lambda p, c=changed: read(p) + (b"#" if str(p).endswith(c) else b"")
            )
            assert key_of(SPEC) != keys[0], changed
    library._source_digest.cache_clear()
    assert key_of(SPEC) == keys[0]


def test_every_compiler_file_is_in_the_key_or_cannot_change_code() -> None:
    files = {path.name for path in Path(library.__file__).parent.parent.joinpath("compiler").glob("*.py")}
    assert files == {
        *library._COMPILER_SOURCES,
        "__init__.py",
        "bindings.py",
        "cache_directory.py",
        "explain.py",
        "object_cache.py",
    }


def test_symbols_are_c_names_and_specs_are_data() -> None:
    spec = gemm.gemm_spec(20, 40, 20, 64, bias=True, activation="silu")
    assert spec.symbol.isidentifier()
    assert spec.symbol.startswith("gemm_k20_n40_")
    assert spec in {gemm.gemm_spec(20, 40, 20, 64, bias=True, activation="silu")}
    assert isinstance(dict(spec.params), Mapping)


def test_the_log_names_the_package(
    fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "linker", lambda: None)
    with caplog.at_level(logging.WARNING, logger="nanoserve"):
        use(load_kernels([SPEC])[SPEC])
    assert [record.name for record in caplog.records] == ["nanoserve.kernels"]
