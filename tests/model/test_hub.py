"""Model names: directories, hub ids, the local cache, and what is said when nothing is found."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from hsrpc.errors import CheckpointError, ModelNotFoundError
from hsrpc.model.hub import forbid_downloads, resolve_model


class FakeHub:
    """Stands in for `snapshot_download`: a cache and a remote copy, each a directory or an error."""

    def __init__(self, cached: Path | Exception, remote: Path | Exception) -> None:
        self.copies = {True: cached, False: remote}
        self.patterns: list[str] = []
        self.asked: list[str] = []

    def __call__(self, name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.patterns = allow_patterns
        self.asked.append("cache" if local_files_only else "hub")
        copy = self.copies[local_files_only]
        if isinstance(copy, Exception):
            raise copy
        return str(copy)


@pytest.fixture
def hub(monkeypatch):
    """Puts a fake hub in place."""

    def install(cached: Path | Exception, remote: Path | Exception) -> FakeHub:
        fake = FakeHub(cached, remote)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    return install


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """The error without a response, whose class differs between versions of the client."""
    return kind.__new__(kind, "refused")


def make_model(directory: Path, *files: str) -> Path:
    directory.mkdir()
    for file in files:
        (directory / file).write_text("{}")
    return directory


NOT_CACHED = errors.LocalEntryNotFoundError("not cached")


def test_directory_is_itself(tmp_path):
    """An existing directory needs no hub."""
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "absent", "", "~/absent", "org/..", "a--b/c"])
def test_missing_path_is_refused_without_asking_the_hub(hub, name):
    """What cannot be a hub id is a directory that is not there."""
    fake = hub(NOT_CACHED, NOT_CACHED)
    with pytest.raises(ModelNotFoundError, match="is not a directory; give a directory, or a hub id"):
        resolve_model(name)
    assert fake.asked == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llama-2-7b", "; for random weights, give random:llama-2-7b"),
        ("OPT-30B", "; for random weights, give random:opt-30b"),
        ("llama2-7b", "; for random weights, give random:llama-2-7b or random:llama-"),
        ("absent", ""),
        ("./llama-2-7b", ""),
    ],
)
def test_a_name_like_a_shape_is_told_of_random_weights(name, hint):
    """A bare name that is a known shape, or nearly one, may have meant that; a path has not."""
    with pytest.raises(ModelNotFoundError, match=r"or a hub id such as org/name") as refused:
        resolve_model(name)
    told = str(refused.value).partition("org/name")[2]
    assert told.startswith(hint)
    assert bool(told) == bool(hint)


def test_a_model_to_convert_has_no_random_weights():
    """What has no file cannot be converted, so nothing is said of it."""
    with pytest.raises(ModelNotFoundError, match=r"or a hub id such as org/name$"):
        resolve_model("llama-2-7b", pickled=True)


def test_file_is_refused(tmp_path):
    """A weights file is not a model."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelNotFoundError, match="is a file; give the directory"):
        resolve_model(str(file))


def test_complete_cache_needs_no_network(hub, tmp_path):
    """A cached model is used as it is."""
    cached = make_model(tmp_path / "cached", "config.json", "model.safetensors")
    fake = hub(cached, http_error(errors.HfHubHTTPError))
    assert resolve_model("org/name") == cached
    assert fake.asked == ["cache"]


def test_incomplete_cache_is_completed(hub, tmp_path):
    """A cache that lacks a shard of the index is not taken for the model."""
    cached = make_model(tmp_path / "cached", "config.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    remote = make_model(tmp_path / "remote", "config.json", "model.safetensors")
    assert hub(cached, remote)
    assert resolve_model("org/name") == remote


def test_only_data_is_fetched(hub, tmp_path):
    """Neither code nor pickles are asked for; pickles only for conversion."""
    remote = make_model(tmp_path / "remote", "config.json", "model.safetensors", "pytorch_model.bin")
    fake = hub(NOT_CACHED, remote)
    resolve_model("org/name")
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in fake.patterns)
    resolve_model("org/name", pickled=True)
    assert "pytorch_model*.bin" in fake.patterns


def test_model_with_pickles_alone_points_to_the_converter(hub, tmp_path):
    """A model without safetensors says how to make them."""
    hub(NOT_CACHED, make_model(tmp_path / "remote", "config.json"))
    with pytest.raises(ModelNotFoundError, match="run `hsrpc convert org/name DIRECTORY`"):
        resolve_model("org/name")
    with pytest.raises(ModelNotFoundError, match="serve it without converting it"):
        resolve_model("org/name", pickled=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(errors.RepositoryNotFoundError), "nor a public model on the hub; check the spelling"),
        (http_error(errors.GatedRepoError), "needs its owner's permission"),
        (http_error(errors.HfHubHTTPError), "the hub is out of reach"),
        (NOT_CACHED, "the hub is out of reach; fetch it where there is a network"),
        (errors.OfflineModeIsEnabled("offline"), "the hub is out of reach"),
        (errors.HFValidationError("bad"), "nor a hub id"),
    ],
)
def test_reason_of_a_failure_is_said(hub, error, words):
    """Wrong name, no permission and no network each have their own words."""
    hub(NOT_CACHED, error)
    with pytest.raises(ModelNotFoundError, match=words):
        resolve_model("org/name")


def test_a_link_out_of_a_directory_is_refused(tmp_path):
    """A model that was fetched cannot have other files of the machine read."""
    (tmp_path / "secret.json").write_text("{}")
    model = make_model(tmp_path / "model", "model.safetensors")
    (model / "config.json").symlink_to("../secret.json")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a file of the model, found a link out of it"):
        resolve_model(str(model))
    assert resolve_model(str(model), trust_links=True) == model


def test_links_within_a_model_are_followed(tmp_path, hub):
    """Links to files of the same directory, and to the blobs of the hub's cache, are part of the model."""
    model = make_model(tmp_path / "model", "model.safetensors", "first.json")
    (model / "config.json").symlink_to("first.json")
    assert resolve_model(str(model)) == model
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs/abc").write_text("{}")
    (cache / "snapshots").mkdir()
    snapshot = make_model(cache / "snapshots/main", "model.safetensors")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    hub(snapshot, NOT_CACHED)
    assert resolve_model("org/name") == snapshot


def test_downloads_can_be_forbidden(monkeypatch, tmp_path):
    """Afterwards the hub's library fails without a connection."""
    connected = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: connected.append(True))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: connected.append(True) or [])
    forbid_downloads()
    with pytest.raises(ModelNotFoundError, match="the hub is out of reach"):
        resolve_model("some-org/some-model")
    assert connected == []
