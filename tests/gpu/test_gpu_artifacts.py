"""Compiled GPU kernels on disk: found again, verified, made anew when damaged, used without compilers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoserve.compiler.cache_directory import CacheRefused
from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore, launch_of
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.llvm_text import UnknownText, readable
from nanoserve.compiler.gpu.spec import Extent
from nanoserve.kernels.cuda import library
from nanoserve.kernels.cuda.activation import convert_spec
from nanoserve.kernels.cuda.gemm_tile import Tile

CHIP = parse_chip("sm_90")
SPEC = convert_spec(64, 64, 64)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Symbols of what is compiled from here on."""
    symbols: list[str] = []
    compile_kernel = library.compile_kernel

    def counting(spec, chip):  # type: ignore[no-untyped-def]
        symbols.append(spec.symbol)
        return compile_kernel(spec, chip)

    monkeypatch.setattr(library, "compile_kernel", counting)
    return symbols


def load(store: ArtifactStore) -> Artifact:
    return library.load_artifacts([SPEC], CHIP, store)[SPEC]


def test_a_kernel_is_compiled_once(tmp_path: Path, compiled: list[str]) -> None:
    first = load(ArtifactStore(tmp_path / "cuda"))
    second = load(ArtifactStore(tmp_path / "cuda"))
    assert compiled == [SPEC.symbol]
    assert second == first
    assert first.cubin.startswith(b"\x7fELF")
    assert f".entry {SPEC.symbol}" in first.ptx
    assert first.chip == "sm_90"
    assert all(name in first.toolchain for name in ("mlir", "llvmlite", "ptxas"))


def test_the_manifest_says_how_to_launch(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "cuda")
    launch = load(store).launch
    assert launch == launch_of(SPEC, CHIP)
    assert launch.arguments[:2] == (("x", True), ("out", True))
    assert launch.grid[0] == Extent("m")
    manifest = json.loads((store.directory / f"{library.key_of(SPEC, CHIP)}.json").read_text())
    assert manifest["launch"]["grid"] == [["m", 1, 1], [None, 1, 1], [None, 1, 1]]
    assert manifest["usage"]["registers"] > 0


@pytest.mark.parametrize("suffix", ["cubin", "ptx", "ll", "json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_file_is_made_again(tmp_path: Path, compiled: list[str], suffix: str, damage: str) -> None:
    store = ArtifactStore(tmp_path / "cuda")
    first = load(store)
    (path,) = store.directory.glob(f"*.{suffix}")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"[" + data[1:-1] + b"?")
    assert load(store) == first
    assert len(compiled) == 2
    assert path.read_bytes() == data


def test_a_manifest_names_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path / "cuda")
    load(store)
    (path,) = store.directory.glob("*.json")
    manifest = json.loads(path.read_text())
    manifest["files"]["cubin"] = "../../" + manifest["files"]["cubin"][6:]
    path.write_text(json.dumps(manifest))
    opened: list[str] = []
    read = store._read
    monkeypatch.setattr(store, "_read", lambda name, limit: opened.append(name) or read(name, limit))
    assert store.find(path.stem) is None
    assert opened == [path.name]


def test_a_machine_without_compilers_uses_what_is_there(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "cuda")
    first = load(store)
    monkeypatch.setattr(library.cubin, "version", lambda: None)
    assert library.toolchain() is None
    assert load(store) == first
    with pytest.raises(library.KernelMissing, match=r"is not in .*cuda, and compiling it needs torch-mlir"):
        library.load_artifacts([convert_spec(128, 128, 128)], CHIP, store)
    assert len(compiled) == 1


def test_other_compilers_make_it_anew(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "cuda")
    load(store)
    monkeypatch.setattr(library.cubin, "version", lambda: "ptxas 99.0")
    assert "ptxas 99.0" in load(store).toolchain
    assert load(store).toolchain.endswith("ptxas 99.0")
    assert len(compiled) == 2


def test_the_key_covers_spec_sources_and_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        library.key_of(SPEC, CHIP),
        library.key_of(SPEC, parse_chip("sm_80")),
        library.key_of(convert_spec(128, 128, 128), CHIP),
    }
    monkeypatch.setattr(library, "_source_digest", lambda kind: "other")
    keys.add(library.key_of(SPEC, CHIP))
    assert len(keys) == 4


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cuda"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(CacheRefused, match="GPU kernel cache"):
        ArtifactStore(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fadd float %x, 1.128520e+00", "fadd float %x, 0x3FF20E6B00000000"),
        ("fmul float %x, f0x39800000", "fmul float %x, 0x3F30000000000000"),
        ("phi float [ -inf, %a ], [ +qnan, %b ]", "phi float [ 0xFFF0000000000000, %a ], [ 0x7FF8000000000000, %b ]"),
        ("fadd double %x, 1.000000e-01", "fadd double %x, 1.000000e-01"),
        ("fadd double %x, f0x3FB999999999999A", "fadd double %x, 0x3FB999999999999A"),
        ("fadd bfloat %x, f0x3F80", "fadd bfloat %x, 0xR3F80"),
        ("store half f0x3C00, ptr %p", "store half 0xH3C00, ptr %p"),
        ("call @__nv_fmaf(float -0.000000e+00)", "call @llvm.fma.f32(float 0x8000000000000000)"),
        (
            "@__dynamic_shmem__0 = internal addrspace(3) global [0 x i8] undef, align 16",
            "@__dynamic_shmem__0 = external addrspace(3) global [0 x i8], align 1024",
        ),
        ("%1.5e+3 = add i32 %x1.000000e+00, 1", "%1.5e+3 = add i32 %x1.000000e+00, 1"),
    ],
)  # fmt: skip
def test_newer_text_is_made_readable(text: str, expected: str) -> None:
    assert readable(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "call float @__nv_expf(float %a)",
        "fadd bfloat %x, 1.500000e-01",
        "ret f0x3F800000",
        "fadd half %x, -inf",
    ],
)
def test_text_without_a_readable_form_is_refused(text: str) -> None:
    with pytest.raises(UnknownText):
        readable(text)


@pytest.mark.parametrize(("dtype", "k_tile"), [("f32", 32), ("bf16", 64), ("bf16", 32)])
def test_eight_rows_of_a_tile_are_in_eight_banks(dtype: str, k_tile: int) -> None:
    """No result shows bank conflicts: of any 8 neighbouring rows, the lines of one k, 16 bytes, never meet."""

    class Number(int):
        """An int with a Value's operators, which is all that `place` needs."""

    tile = Tile(16, 64, k_tile, dtype, 2)
    row_bytes = tile.lines * 16
    for first in (0, 8):
        for line in range(tile.lines):
            banks = {
                (row * row_bytes + tile.place(Number(row), Number(line)) * 16) % 128
                for row in range(first, first + 8)
            }
            assert len(banks) == 8
    assert all(
        {tile.place(row, line) for line in range(tile.lines)} == set(range(tile.lines)) for row in range(16)
    )
