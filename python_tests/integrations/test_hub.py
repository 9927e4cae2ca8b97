"""lopt/rule/hub.py and a stand-in for the hub: what is pushed comes back, by branch and commit, with a card; errors."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import lopt
from lopt import Theta
from lopt.rule import hub

TOKEN = "hf_secret"


class StandIn(ThreadingHTTPServer):
    """Repositories in memory: branches are lists of commits, a commit has files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.private: dict[str, Any] = {}
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """What pushing and downloading ask for, and no more: files go in the commit itself."""

    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | Any = b"", **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def allowed(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        repos, path = self.server.repos, unquote(self.path)
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif not self.allowed:
            self.answer(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization'] or 'me'}/{given['name']}"
            known = name in repos
            if not known:
                repos[name] = {"main": [("0" * 40, {})]}
                self.server.private[name] = given.get("visibility", given.get("private"))
            self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name})
        elif found := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            name, branch = found.groups()
            known = branch in repos[name]
            repos[name].setdefault(branch, list(repos[name]["main"]))
            self.answer(409 if known else 200, {})
        elif found := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            self.answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif found := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            name, branch = found.groups()
            files = dict(repos[name][branch][-1][1])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = hashlib.sha1(body).hexdigest()
            repos[name][branch].append((commit, files))
            self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self.answer(404, {"error": path})

    def do_GET(self) -> None:
        found = re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", unquote(self.path))
        name, revision, file = found.groups() if found else ("", "", "")
        repo = self.server.repos.get(name)
        if repo is None or (self.server.private[name] and not self.allowed):
            self.answer(404, b"", X_Error_Code="RepoNotFound")
            return
        commits = (
            [repo[revision][-1]] if revision in repo else [c for b in repo.values() for c in b if c[0] == revision]
        )
        if not commits:
            self.answer(404, b"", X_Error_Code="RevisionNotFound")
            return
        commit, files = commits[0]
        if file not in files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self.answer(200, files[file], ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


#: Another process, as the hub's library reads its settings when it is imported.
SCRIPT = """
import json
from lopt import Theta

found = {}
theta, other = Theta.load("compact"), Theta.load("train-loss")
first = theta.push_to_hub("me/rule", private=True, scores={"test loss over AdamW's": 0.5}, token="hf_secret")
second = other.push_to_hub("rule", token="hf_secret", commit_message="Another")
on_branch = theta.push_to_hub("me/rule", token="hf_secret", revision="trial")
found["commits"] = [first, second, on_branch]


def same(a, b):
    return bool((a.flatten() == b.flatten()).all()) and a.spec == b.spec and a.provenance == b.provenance


def raised(call):
    try:
        call()
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__]
    return []


found["errors"] = [raised(lambda: Theta.from_hub("me/rule", token=False))]  # before anything is in the cache
wanted = [(other, {}), (theta, {"revision": first.split("/")[-1]}), (theta, {"revision": "trial"})]
found["same"] = [same(expected, Theta.from_hub("me/rule", token="hf_secret", **more)) for expected, more in wanted]
found["cached"] = same(other, Theta.from_hub("me/rule", local_files_only=True))
for call in (
    lambda: Theta.from_hub("me/none", token="hf_secret"),
    lambda: Theta.from_hub("me/rule", token="hf_secret", revision="none"),
    lambda: Theta.from_hub("me/rule", token="hf_secret", filename="none.safetensors"),
    lambda: theta.push_to_hub("me/rule", token="hf_wrong"),
    lambda: Theta.from_hub("me/rule", token="hf_secret", filename="README.md"),
    lambda: Theta.from_hub("me/none", local_files_only=True),
):
    found["errors"].append(raised(call))
print(json.dumps(found))
"""


def test_what_is_pushed_comes_back(stand_in: StandIn, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(lopt.__file__).parents[1]), *sys.path]),
        "HF_ENDPOINT": stand_in.url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    main, trial = stand_in.repos["me/rule"]["main"], stand_in.repos["me/rule"]["trial"]
    assert found["commits"] == [f"{stand_in.url}/me/rule/commit/{c}" for c in (main[1][0], main[2][0], trial[-1][0])]
    assert stand_in.messages == ["Upload theta", "Another", "Upload theta"]
    assert stand_in.private["me/rule"] in (True, "private")
    assert found["same"] == [True, True, True]
    assert found["cached"]
    expected = ["RepositoryNotFoundError"] * 2 + ["RevisionNotFoundError", "EntryNotFoundError", "HfHubHTTPError"]
    expected += ["ValueError", "LocalEntryNotFoundError"]
    assert len(found["errors"]) == len(expected)
    for name, kinds in zip(expected, found["errors"], strict=True):
        assert name in kinds
    files = main[1][1]
    assert sorted(files) == ["README.md", "theta.safetensors"]
    assert files["theta.safetensors"] == Theta.load("compact").to_bytes()
    assert files["README.md"].decode() == hub.card(
        Theta.load("compact"),
        "me/rule",
        {"test loss over AdamW's": 0.5},
        hashlib.sha256(files["theta.safetensors"]).hexdigest(),
    )


def test_the_card_says_how_theta_was_made_and_what_it_scores() -> None:
    theta = Theta.load("compact")
    text = hub.card(theta, "me/rule", {"test loss over AdamW's": 0.51234}, "abc")
    made = theta.provenance
    for line in (
        "library_name: lopt",
        'optimizer = LearnedOptimizer(model, Theta.from_hub("me/rule"))',
        "| recipe | continue |",
        "| begun from | default |",
        f"| tasks | {', '.join(made['config']['tasks'])} |",
        f"| inner steps | {made['inner_steps']:,} |",
        f"| commit of lopt | {made['commit']} |",
        "| sha256 of the file | abc |",
        f"| validation of this theta | {made['validation']['best']:.4g} |",
        "| test loss over AdamW's | 0.5123 |",
    ):
        assert f"{line}\n" in text
    told = re.search("```json\n(.*?)\n```", text, re.DOTALL)
    assert told is not None
    assert json.loads(told[1]) == made
    own = Theta(theta.spec, theta.tensors, {"config": {"tasks": {"own": [{"name": "mine"}, "mlp"]}}})
    assert "| tasks | mine, mlp |\n" in hub.card(own, "me/rule", None, "abc")
    bare = hub.card(Theta(theta.spec, theta.tensors), "me/rule", None, "abc")
    assert "None.\n" in bare


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    theta = Theta.init_adam()
    for call in (lambda: theta.push_to_hub("me/rule"), lambda: Theta.from_hub("me/rule")):
        with pytest.raises(ModuleNotFoundError, match=r"hub: huggingface_hub is missing; pip install 'lopt\[hub\]'"):
            call()
