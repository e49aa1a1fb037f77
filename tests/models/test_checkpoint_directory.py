"""`LLM("...")`: what is a path, what is a name on the hub, and what is said when neither gives a checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from nanoserve import CheckpointError
from nanoserve.models import hub
from nanoserve.models.checkpoint import checkpoint_directory, load_weights
from nanoserve.models.safetensors_file import read_safetensors

ROOT = Path(__file__).resolve().parents[2]


def make(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Every call of snapshot_download, answered with a directory instead of the network."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def answer(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(make(tmp_path / "snapshot", "config.json", "model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_directory_is_taken_as_it_is(tmp_path: Path, downloads: list[Any]) -> None:
    """Path or str, absolute or relative, even where the name could be the hub's; a symlink too."""
    directory = make(tmp_path / "org" / "name", "config.json")
    (tmp_path / "link").symlink_to(directory)
    for model in (directory, str(directory), "org/name", "./org/name", "link", Path("org/name")):
        assert checkpoint_directory(model).resolve() == directory
    assert downloads == []


@pytest.mark.parametrize(
    ("model", "revision"),
    [("Qwen/Qwen3-0.6B", None), ("gpt2", None), ("a/b_c.d-e", "main"), ("x" * 96, "0123abc")],
)
def test_a_name_goes_to_the_hub(
    downloads: list[Any], tmp_path: Path, model: str, revision: str | None
) -> None:
    """As it is written, with its revision; only a checkpoint's own files are asked for."""
    assert checkpoint_directory(model, revision=revision) == tmp_path / "snapshot"
    assert [(call["repo_id"], call["revision"]) for call in downloads] == [(model, revision)]


def test_the_weights_can_be_left_where_they_are(downloads: list[Any]) -> None:
    """For who reads config and tokenizer only: everything but the large files."""
    checkpoint_directory("org/name", weights=False)
    (call,) = downloads
    assert "*.safetensors" not in call["allow_patterns"]
    assert {"config.json", "*.safetensors.index.json", "tokenizer*.json"} <= set(call["allow_patterns"])


def test_only_a_checkpoints_files_are_asked_for(downloads: list[Any]) -> None:
    """By the library's own matching: no code, no pickles, no second copy of the weights, no subdirectories."""
    from huggingface_hub.utils import filter_repo_objects

    checkpoint_directory("org/name")
    (call,) = downloads
    wanted = """config.json generation_config.json model.safetensors model-00001-of-00002.safetensors tokenizer.json
        model.safetensors.index.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
        chat_template.jinja chat_template.json""".split()
    others = """pytorch_model.bin model.pt model.pth flax_model.msgpack tf_model.h5 model.gguf modeling_x.py README.md
        onnx/model.onnx onnx/config.json original/model.safetensors consolidated.safetensors training_args.bin
        consolidated.00.pth pytorch_model.bin.index.json .gitattributes preprocessor_config.json""".split()
    chosen = filter_repo_objects(
        wanted + others, allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"]
    )
    assert sorted(chosen) == sorted(wanted)


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "../nowhere", "/nowhere/at/all", "a/b/c", "a\\b", "org/name/", "~/model", "", ".", "..", "-x", "a--b", "a..b",
     "org/", "/org", "naïve", "a b", "x" * 97, "model.safetensors", "m.pt", "weights.gguf", "repo.git", "a\nb", "http://x/y",
     Path("org/name"), Path("gpt2")],
)  # fmt: skip
def test_a_path_never_reaches_the_network(downloads: list[Any], model: str | Path) -> None:
    """What looks like a path, is a Path, or breaks the hub's rules is refused at once."""
    with pytest.raises(CheckpointError, match=r"no such directory|holds no config.json"):
        checkpoint_directory(model)
    assert downloads == []


@pytest.mark.parametrize(
    "name", ["gpt2", "org/name", ".hidden", "a--b", "a..b", "x.git", "a/b/c", "-a", "a-", "a.", "org/-b", "_a_", "é", "x" * 97, "a/" + "x" * 96]
)  # fmt: skip
def test_names_follow_the_hubs_own_rules(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = True
    except HFValidationError:
        valid = False
    assert hub.is_repo_id(name) == valid


def test_what_the_operating_system_refuses_is_named(tmp_path: Path) -> None:
    """A name too long for the file system is a CheckpointError as well, for directories and files."""
    for call in (checkpoint_directory, load_weights, read_safetensors):
        with pytest.raises(CheckpointError, match="x: cannot be read"):
            call(tmp_path / ("x" * 300))


def test_what_is_there_instead_of_a_config(tmp_path: Path) -> None:
    """A directory without config.json says what it holds; a file is not a directory; gguf gets its conversion."""
    with pytest.raises(CheckpointError, match=r"holds no config\.json; it is empty$"):
        checkpoint_directory(make(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"it holds a, b, c, d, e, and 2 more$"):
        checkpoint_directory(make(tmp_path / "many", *"abcdefg"))
    with pytest.raises(
        CheckpointError, match=r"it holds m\.gguf; convert its \.gguf files once .*gguf_file=name"
    ):
        checkpoint_directory(make(tmp_path / "gguf", "m.gguf"))
    file = make(tmp_path / "files", "model.safetensors") / "model.safetensors"
    with pytest.raises(CheckpointError, match="is a file, must be the directory"):
        checkpoint_directory(file)


@pytest.mark.parametrize("revision", ["", 3, b"main"])
def test_revisions_are_names(downloads: list[Any], revision: Any) -> None:
    with pytest.raises(CheckpointError, match=r"revision: .* must be the name"):
        checkpoint_directory("org/name", revision=revision)


def test_a_revision_of_a_local_directory_is_refused(tmp_path: Path) -> None:
    """It could not be honoured."""
    with pytest.raises(CheckpointError, match="revision: 'main' is for the hub"):
        checkpoint_directory(make(tmp_path, "config.json"), revision="main")


def _hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    error_type = getattr(errors, name)
    if name == "IncompleteSnapshotError":
        return error_type("long text", snapshot_path="x")
    if not issubclass(error_type, errors.HfHubHTTPError):
        return error_type("long text\nof several lines")
    return error_type("long text\nof several lines", response=Mock(headers={}))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "accept its terms at huggingface.co/org/name, then hf auth login or set HF_TOKEN"),
        ("RepositoryNotFoundError", "neither a directory here nor a model the hub shows you; check the name"),
        ("RevisionNotFoundError", "org/name at revision 'v9': the hub has the model but no such revision"),
        (
            "IncompleteSnapshotError",
            "no such directory here and only partly in the local cache, and HF_HUB_OFFLINE=1",
        ),
        (
            "LocalEntryNotFoundError",
            "no such directory here and not in the local cache, and HF_HUB_OFFLINE=1",
        ),
        ("HFValidationError", "give org/name or a local directory"),
        ("HfHubHTTPError", "the download failed (HfHubHTTPError: 'long text"),
        ("OfflineModeIsEnabled", "the download failed (OfflineModeIsEnabled"),
    ],
)
def test_each_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: str, words: str) -> None:
    """What happened and what to do, on one line, and the library's exception behind it."""
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise _hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        checkpoint_directory("org/name", revision="v9")
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__).__name__ == error


def test_no_connection_names_the_offline_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise _hub_error("LocalEntryNotFoundError")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        CheckpointError, match=r"the hub cannot be reached; connect, .*HF_HUB_OFFLINE=1 serves what is cached"
    ):
        checkpoint_directory("org/name")


def test_an_interrupted_download_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of gigabytes is the user's, not a damaged checkpoint."""
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_directory("org/name")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional; the sentence says how to get it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub, or give a local directory"):
        checkpoint_directory("org/name")


def test_really_offline(tmp_path: Path) -> None:
    """The library itself, HF_HUB_OFFLINE=1: a clear sentence for what is not cached, the snapshot for what is."""
    snapshot = make(tmp_path / "models--org--cached" / "snapshots" / ("a" * 40))
    blob = make(tmp_path / "models--org--cached" / "blobs", "blob") / "blob"
    (snapshot / "config.json").symlink_to(os.path.relpath(blob, snapshot))
    refs = make(tmp_path / "models--org--cached" / "refs")
    (refs / "main").write_text("a" * 40)
    program = (
        "import socket\n"
        "def refuse(*arguments, **options): raise SystemExit('a network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from nanoserve.models.checkpoint import checkpoint_directory\n"
        "print(checkpoint_directory('org/cached'))\n"
        "try: checkpoint_directory('org/absent')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT / "python"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found, message = done.stdout.strip().splitlines()
    assert Path(found) == snapshot
    assert message.startswith(
        "org/absent: no such directory here and not in the local cache, and HF_HUB_OFFLINE=1"
    )
