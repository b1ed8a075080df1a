"""Fetching models from the hub, for which a local server stands: huggingface_hub raises what it would raise there."""

import base64
import hashlib
import http.server
import json
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from loaded_models import resolve

import saejax
from saejax.dictionaries import DictionaryConfig
from saejax.errors import UserError
from saejax.models import identity

COMMIT = "0123456789" * 4
COMMITS: list[dict[str, str]] = []  # the files of each, in base64
REFUSALS = {
    "renew": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "busy": (429, {}),
    "broken": (500, {}),
    "missing": (401, {"X-Error-Code": "RepoNotFound"}),
    "nosuch": (404, {"X-Error-Code": "RevisionNotFound"}),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download takes, for the files of one folder."""

    folder: Path
    served: set[str]  # of a hub whose connection breaks
    breaks = True

    def log_message(self, *args):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        for name, refusal in REFUSALS.items():
            if name in parts:
                return self.answer(*refusal)
        if "resolve" in parts:
            return self.answer(*self.file(parts))
        files = sorted(self.folder.iterdir())
        data = dict(_id="1", id="/".join(parts[2:4]), sha=COMMIT, siblings=[dict(rfilename=f.name) for f in files])
        if "tree" in parts:
            data = [dict(type="file", path=f.name, size=f.stat().st_size, oid="0" * 40) for f in files]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def file(self, parts):
        file = self.folder / parts[-1]
        if "gated" in parts:
            return 403, {"X-Error-Code": "GatedRepo"}
        if not file.exists():
            return 404, {"X-Error-Code": "EntryNotFound"}
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if "cut" in parts and self.breaks and self.command == "GET":  # half of it once, and then nothing
            headers["Content-Length"] = str(len(body))
            body = b"" if file.name in self.served else body[: len(body) // 2]
            self.served.add(file.name)
        return 200, headers, body

    do_HEAD = do_GET

    def do_POST(self):
        """What a push takes; every file comes inside its commit, as small ones do."""
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        sent, made = (
            [json.loads(line) for line in lines],
            dict(url="https://huggingface.co/org/saes", errors=[], warnings=[]),
        )
        is_public = self.path == "/api/validate-yaml"
        if not is_public and (self.headers["Authorization"] != "Bearer hf_right" or "denied" in self.path):
            return self.answer(403, {"X-Error-Message": "You have no rights"}, b'{"error": "You have no rights"}')
        if "/preupload/" in self.path:
            made = dict(
                files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in sent[0]["files"]]
            )
        if "/commit/" in self.path:
            if "broken" in self.path:
                return self.answer(500, {})
            COMMITS.append({f["value"]["path"]: f["value"]["content"] for f in sent if f["key"] == "file"})
            made = dict(commitUrl="https://huggingface.co/org/saes/commit/" + COMMIT, commitOid=COMMIT)
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(made).encode())


@pytest.fixture
def hub(copy, tmp_path, monkeypatch):
    """A server that has the tiny model under every name but those that ``Hub`` refuses."""
    handler = type("Handler", (Hub,), dict(folder=copy, served=set()))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    COMMITS.clear()
    yield copy
    server.shutdown()


def test_a_model_from_the_hub(hub, monkeypatch):
    """Also once it was fetched, without network."""
    wanted = {file.name for file in hub.iterdir()}
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "model.onnx", "m.gguf"):
        (hub / name).write_bytes(b"the weights again")
    found = resolve("org/model")
    assert (found.name, found.revision) == ("org/model", COMMIT)
    assert {file.name for file in found.folder.iterdir()} == wanted
    assert found.fingerprint == identity.fingerprint(found.folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/model") == found


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_from_the_hub(hub, kind):
    """Those that the index names, and no weights of another format than the first that there is."""
    parts = [f"{kind.partition('.')[0]}-0000{part}-of-00002.{kind.partition('.')[2]}" for part in (1, 2)]
    for part in parts:
        torch.save({}, hub / part) if part.endswith("bin") else shutil.copy(hub / "model.safetensors", hub / part)
    (hub / "model.safetensors").rename(hub / "consolidated.safetensors")
    (hub / f"{kind}.index.json").write_text(json.dumps(dict(weight_map={"a": parts[0], "b": parts[1]})))
    (hub / "training_args.bin").write_bytes(b"something else")
    folder = resolve("org/model").folder
    weights = {file.name for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")}
    assert weights == set(parts)


def test_a_model_without_weights_on_the_hub(hub):
    (hub / "model.safetensors").rename(hub / "flax_model.msgpack")
    with pytest.raises(UserError, match=r"https://huggingface.co/org/model has no weights for transformers: expected"):
        resolve("org/model")


def test_a_model_with_an_adapter_on_the_hub(hub):
    (hub / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        resolve("org/model")


@pytest.mark.parametrize(
    "name, revision, message",
    [
        ("org/gated", "main", "accept its licence at https://huggingface.co/org/gated, then set the variable HF_TOKEN"),
        ("org/missing", "main", "there is no model 'org/missing'.*HF_TOKEN"),
        ("org/model", "nosuch", "org/model has no revision 'nosuch'"),
        ("org/renew", "main", r"org/renew could not be fetched \(.*401.*\): .* token in .* HF_TOKEN.*: renew"),
        ("org/disabled", "main", r"could not be fetched \(.*disabled.*\): try again, or give a local folder"),
        ("org/busy", "main", r"could not be fetched \(.*429.*\): try again"),
        ("org/broken", "main", r"could not be fetched \(.*500.*\): try again"),
    ],
)
def test_what_the_hub_refuses(hub, name, revision, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(name, revision)
    assert "\n" not in str(error.value)


def test_a_download_that_is_cut_off_goes_on_later(hub, monkeypatch):
    with pytest.raises(UserError, match=r"org/cut could not be fetched \(.*\): try again, or give a loc") as error:
        resolve("org/cut")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(Hub, "breaks", False)
    assert resolve("org/cut").fingerprint == identity.fingerprint(hub)


def test_a_disk_without_room_and_a_network_that_is_gone(hub, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", full)
        with pytest.raises(UserError, match=r"No space left on device\): free space, or set the variable HF_HOME"):
            resolve("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = "there is no folder org/model here, it is not in the hub's cache, and the hub cannot be reached"
    with pytest.raises(UserError, match=line):
        resolve("org/model")


def test_the_family_is_looked_at_before_the_weights_are_fetched(hub, tmp_path):
    (hub / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="org/model/config.json: the JAX decoder does not have the family 'mamba'"):
        resolve("org/model", decoder=True)
    assert not list((tmp_path / "hub_cache").rglob("*.safetensors"))
    assert list(resolve("org/model").folder.glob("*.safetensors"))
    (hub / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json at revision 'main'"):
        resolve("org/model2")


@pytest.fixture
def dictionary():
    config = DictionaryConfig(kind="topk", site="resid_post.3", d_in=8, n_features=16, k=4, model="org/model")
    return saejax.Dictionary.initial(config, jax.random.key(0))


def test_a_dictionary_is_pushed_in_one_commit_that_loads(hub, dictionary, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    address = saejax.push(dictionary, "org/saes", figures={"explained variance": 0.8123, "dead": None})
    assert address == f"https://huggingface.co/org/saes/commit/{COMMIT}"
    (files,) = COMMITS
    assert {*files} == {"README.md", "resid_post.3/cfg.json", "resid_post.3/sae_weights.safetensors"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(base64.b64decode(content))
    x_BxD = jax.random.normal(jax.random.key(1), (5, 8))
    loaded = saejax.load_dictionary(tmp_path / "resid_post.3")
    np.testing.assert_array_equal(loaded.encode(x_BxD), dictionary.encode(x_BxD))
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/model\n" in card and 'load_dictionary("hf://org/saes/resid_post.3")' in card
    assert "| resid_post.3 | topk (k 4) | resid_post.3 | resid_post.3 | 16 | 0.8123 |  |" in card


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("", "org/saes", "takes a token that may write: set the variable HF_TOKEN, or run `hf auth login`"),
        ("hf_wrong", "org/saes", r"was not pushed \(.*\): the token may not write there"),
        ("hf_right", "org/denied", r"was not pushed \(.*rights.*\): the token may not write there"),
        ("hf_right", "org/broken", r"was not pushed \(.*500.*\): try again"),
        ("hf_right", "no/such/name", "'no/such/name' is no name of a repository"),
        ("hf_right", "org/gone", "org/gone was not pushed: the hub cannot be reached"),
    ],
)
def test_a_push_that_cannot_be_leaves_nothing(hub, dictionary, monkeypatch, tmp_path, token, name, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if name == "org/gone":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=message) as error:
        saejax.push(dictionary, name)
    assert "\n" not in str(error.value) and not COMMITS
