"""The Kubernetes profile: what its jobs ask a cluster for. The cluster is a small server that takes jobs down.

``make test-kubernetes`` has this: Snakemake's plugin is in an environment of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftscope.sweep import expand

pytestmark = pytest.mark.kubernetes


class Cluster(ThreadingHTTPServer):
    """Takes every job, keeps its description, and says that it failed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Cluster

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            self.server.jobs.append(content)
        self._answer(content)

    def do_GET(self) -> None:
        if "/pods" in self.path:
            self._answer({"kind": "PodList", "items": []})
        else:
            self._answer({"kind": "Job", "status": {"failed": 1}})

    def do_DELETE(self) -> None:
        self._answer({"kind": "Status", "status": "Success"})


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    server = Cluster()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    access = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
    (tmp_path / "access.yaml").write_text(yaml.safe_dump(access))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "access.yaml"))
    yield server
    server.shutdown()


def test_each_attempt_asks_for_a_card_its_memory_and_the_volume(
    cluster: Cluster, repository: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "peftscope"
    folder.mkdir()
    for name in ("experiments", "profiles"):
        shutil.copytree(repository / name, folder / name)
    for name in ("Snakefile", "src"):
        (folder / name).symlink_to(repository / name)
    shutil.copytree(toy / "resources", folder / "resources")
    monkeypatch.chdir(folder)
    profile = Path("profiles/kubernetes/profile.yaml")
    # The clone lies on the volume, wherever that is mounted.
    profile.write_text(profile.read_text().replace("peftscope:/work", f"peftscope:{tmp_path}"))
    run = next(identity for identity in expand("smoke").runs if identity.startswith("lora"))
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/kubernetes"]
    command += ["--config", "experiment=smoke", "--set-resources", "train:gpu=1", "--"]
    command += [f"results/smoke/runs/{run}/record.json"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode != 0  # all attempts failed
    assert len(cluster.jobs) == 3, done.stderr[-4000:]
    asked = []
    for number, job in enumerate(cluster.jobs, 1):
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
        asked.append(int(limits["memory"].removesuffix("M")))
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["peftscope"]["persistentVolumeClaim"]["claimName"] == "peftscope"
        assert {"name": "peftscope", "mountPath": str(tmp_path)} in container["volumeMounts"]
        ordered = " ".join([*container["command"], *container["args"]])
        assert str(folder) in ordered
        assert f"attempt {number}" in ordered
    assert asked[1] == pytest.approx(2 * asked[0], abs=1)
    assert asked[2] == pytest.approx(3 * asked[0], abs=1)
