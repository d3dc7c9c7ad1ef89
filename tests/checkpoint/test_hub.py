"""Hub repositories, from a stand-in server that speaks the few requests huggingface_hub makes."""

import json
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch

from miniawq.__main__ import main
from miniawq.checkpoint.hub import HUB_ERRORS, hub_errors
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import plan
from miniawq.errors import NotFound
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.tiny_checkpoints import TOKENS
from tests.helpers.verbs import ARGUMENTS, command

COMMIT = "a1b2c3d4" * 5


@dataclass
class Hub:
    """Files served as owner/name at one commit; `fail` answers every request with a status and an error code."""

    files: dict[str, bytes] = field(default_factory=dict)
    fail: tuple[int, str] | None = None
    old_name: str = "owner/old-name"
    requests: list[str] = field(default_factory=list)

    def bytes_of(self, name: str) -> int:
        """How much of a file has been sent."""
        return sum(int(line.split()[2]) for line in self.requests if line.startswith(f"GET {name} "))


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if hub.fail:
                self.answer(hub.fail[0], X_Error_Code=hub.fail[1], X_Error_Message=hub.fail[1])
            elif hub.old_name in self.path:
                self.answer(307, Location=self.path.replace(hub.old_name, "owner/name"))
            elif found := re.fullmatch(r"/api/models/owner/name/revision/([^?]+).*", self.path):
                self.revision(found[1])
            elif re.match(r"/api/models/owner/name/tree/", self.path):
                entries = [{"type": "file", "path": n, "size": len(c), "oid": sha(c)} for n, c in hub.files.items()]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif found := re.fullmatch(r"/owner/name/resolve/([^/]+)/([^?]+).*", self.path):
                self.resolve(found[2])
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        def revision(self, revision: str) -> None:
            if revision not in ("main", "v1", COMMIT):
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in hub.files]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

        def resolve(self, name: str) -> None:
            if name not in hub.files:
                self.answer(404, X_Error_Code="EntryNotFound")
                return
            content = hub.files[name]
            first, last = 0, len(content) - 1
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(last, int(wanted[2] or last))
            body = content[first : last + 1]
            if self.command == "GET":
                hub.requests.append(f"GET {name} {len(body)}")
            headers = {"ETag": f'"{sha(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            headers["Content_Length"] = str(len(body))
            self.answer(206 if wanted else 200, body, **headers)

    return Handler


def sha(content: bytes) -> str:
    return sha256(content).hexdigest()[:40]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    directory, _ = tiny.make(tmp_path / "published", block=tiny.AWQ_BLOCK, shards=2)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    served = Hub({path.name: path.read_bytes() for path in directory.iterdir()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(served))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_opening_fetches_small_files_and_heads_of_weights_only(hub, tmp_path):
    checkpoint = open_checkpoint("owner/name", cache_dir=tmp_path / "cache")
    assert len(checkpoint.quantized) == 14
    assert checkpoint.files.commit == COMMIT
    kept = {path.name for path in checkpoint.directory.iterdir()}
    assert kept == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_loading_fetches_the_weights_and_no_pickle(hub, tmp_path):
    checkpoint = open_checkpoint("owner/name@v1", cache_dir=tmp_path / "cache")
    logits = load_model(checkpoint, dtype=torch.float32)(TOKENS)
    local = open_checkpoint(tmp_path / "published")
    assert torch.equal(logits, load_model(local, dtype=torch.float32)(TOKENS))
    assert hub.bytes_of("pytorch_model.bin") == 0
    again = open_checkpoint("owner/name@v1", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(load_model(again, dtype=torch.float32)(TOKENS), logits)


def test_cached_model_works_when_the_network_is_gone(hub, tmp_path, monkeypatch):
    load_model(open_checkpoint("owner/name", cache_dir=tmp_path / "cache"))
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    load_model(open_checkpoint("owner/name", cache_dir=tmp_path / "cache"))


FAILURES = {
    "gated": ((403, "GatedRepo"), ["is gated", "https://huggingface.co/owner/name", "HF_TOKEN"]),
    "missing": ((404, "RepoNotFound"), ["there is no owner/name", "hf auth login"]),
    "no-revision": ((404, "RevisionNotFound"), ["no revision", "commits"]),
    "broken-server": ((500, "boom"), ["owner/name", "cannot be reached"]),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_of_the_hub_has_its_own_message(hub, kind, capsys):
    hub.fail, words = FAILURES[kind]
    assert plan.main(["owner/name"]) == 5
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert len(told.splitlines()) <= 4


def test_unknown_revision(hub, capsys):
    assert plan.main(["owner/name", "--revision", "v9"]) == 5
    assert "owner/name has no revision v9" in capsys.readouterr().err


def test_nothing_cached_and_no_network(hub, monkeypatch, capsys):
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert plan.main(["owner/name"]) == 5
    assert "not in the cache" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--local-files-only", "--offline"])
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_local_files_only_asks_no_server(hub, verb, flag, tmp_path, capsys):
    assert main(command(verb, "owner/name", tmp_path, flag)) == 5
    assert "--local-files-only" in capsys.readouterr().err
    assert hub.requests == []


def test_the_reference_of_an_evaluation_has_the_hub_flags_but_not_the_revision(hub, tmp_path):
    """`--revision v1` is the model's; the reference is looked for in the same cache, with the same token."""
    model, _ = tiny.make_dense(tmp_path / "model")
    flags = ["--reference", "owner/name", "--cache-dir", str(tmp_path / "kept"), "--revision", "v9"]
    assert main(command("evaluate", model, tmp_path, *flags)) == 5  # the directory has no tokenizer
    assert (tmp_path / "kept" / "models--owner--name").is_dir()


def test_offline_variable_is_honoured(hub, monkeypatch, capsys):
    """HF_HUB_OFFLINE, as huggingface_hub has read it."""
    load_model(open_checkpoint("owner/name"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    load_model(open_checkpoint("owner/name"))
    assert plan.main(["owner/another"]) == 5
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert hub.requests == []


def test_half_downloaded_weights_offline(hub, tmp_path):
    """Config and index are in the cache, a shard is not."""
    checkpoint = open_checkpoint("owner/name", cache_dir=tmp_path / "cache")
    checkpoint.files.local("model-00001-of-00002.safetensors")
    with pytest.raises(NotFound, match="only partly in the cache") as caught:
        open_checkpoint("owner/name", cache_dir=tmp_path / "cache", local_files_only=True)
    assert "model-00002-of-00002.safetensors" in str(caught.value)


def test_renamed_repository_loads_and_says_so(hub, caplog):
    caplog.set_level(logging.WARNING)
    assert len(open_checkpoint("owner/old-name").quantized) == 14
    assert "owner/old-name is now called owner/name" in caplog.text


def test_no_directory_and_no_hub_id(hub, capsys):
    assert plan.main(["owner name!"]) == 5
    assert "no Hub id" in capsys.readouterr().err


def test_two_revisions(capsys):
    assert plan.main(["owner/name@v1", "--revision", "v2"]) == 2
    assert "two revisions" in capsys.readouterr().err


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_every_error_class_of_the_library_becomes_not_found(name):
    """By name: the classes come and go between releases of huggingface_hub."""
    error = type(name, (Exception,), {})("first line\nsecond")
    with pytest.raises(NotFound) as caught, hub_errors("owner/name", "main"):
        raise error
    assert caught.value.what


def test_errors_of_the_library_are_known_by_their_names():
    """The table's names exist: a renamed class would slip through as a bug report."""
    library = {name for name in dir(huggingface_hub.errors)} | {"ConnectionError", "TimeoutError"}
    assert set(HUB_ERRORS) <= library
