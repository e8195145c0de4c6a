"""What the chart's pods run, read by the real command line."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.settings import RouterSettings
from tests.deploy.chart import CHART, SETS, command_lines, objects_of, render, values_of
from tknp import cli
from tknp.launch.defaults import vllm_options

HAS_DISCOVERY = "discovery" in RouterSettings.model_fields
FROM_PODS = ("--discovery=", "--kubernetes-")
POD_IP = "192.0.2.7"
ENGINE_SETS = (
    *("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_PLUGINS", "VLLM_CPU_OMP_THREADS_BIND"),
    *("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)
"""What an engine sets for the processes that it starts."""


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """The secrets that a router's pod mounts, as files."""
    from tests.router.test_tls import Authority

    for folder in ("tls", "client-ca", "api-keys", "engine-api-key"):
        (tmp_path / folder).mkdir()
    authority = Authority(tmp_path)
    certificate, key = authority.issue("router")
    certificate.rename(tmp_path / "tls" / "tls.crt")
    key.rename(tmp_path / "tls" / "tls.key")
    (tmp_path / "client-ca" / "ca.crt").write_bytes(authority.ca.read_bytes())
    (tmp_path / "api-keys" / "keys.toml").write_text('[[keys]]\nkey = "sk-client-0123456789abcdef"\n')
    (tmp_path / "engine-api-key" / "api-key").write_text("sk-engine\n")
    return tmp_path


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A way to the API server, which a router that watches pods wants at its start."""
    if HAS_DISCOVERY:
        config = tmp_path / "kubeconfig"
        config.write_text(
            "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], "
            "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}], users: [{name: u, user: {token: t}}]}"
        )
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))


def router_settings(words: list[str], monkeypatch: pytest.MonkeyPatch) -> RouterSettings:
    """What `tknp` makes of the words."""
    seen: list[RouterSettings] = []
    monkeypatch.setattr("router.app.run", seen.append)
    cli.app(args=words, standalone_mode=False)
    (settings,) = seen
    return settings


def words_of(name: str, command: str) -> list[list[str]]:
    return [words for words in command_lines(objects_of(name)) if words[0] == command]


@pytest.mark.parametrize("name", SETS)
def test_the_router_reads_its_options(name: str, etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = words_of(name, "router")
    # Those of discovery have a test of their own below.
    words = [word.replace("/etc/tknp", str(etc)) for word in words if not word.startswith(FROM_PODS)]
    settings = router_settings(words, monkeypatch)
    assert (settings.host, settings.port, settings.drain_seconds) == ("0.0.0.0", 8000, 15)
    if name == "everything":
        assert settings.model_aliases == {"gpt-4": "Qwen/Qwen3-8B", "with space": "Qwen/Qwen3-8B"}
        assert settings.cors_allowed_origins == ("https://a.example.org", "https://b.example.org")
        assert (settings.continue_streams, settings.max_body_bytes) == (False, 1_000_000)
        assert settings.otlp_traces_endpoint == "http://collector:4317"
        assert (settings.open_metrics, settings.engine_key) == (True, "sk-engine")
        assert settings.ssl_ca_certs == etc / "client-ca" / "ca.crt"
    if name == "static":
        host = "llm-tknp-decode-{}.llm-tknp-decode.serving.svc:8200"
        assert settings.decode_urls == tuple("http://" + host.format(index) for index in range(3))
        assert len(settings.prefill_urls) == 2


@pytest.mark.xfail(not HAS_DISCOVERY, reason="the router does not watch pods yet", strict=True)
@pytest.mark.usefixtures("cluster")
def test_the_router_reads_how_to_find_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = words_of("minimal", "router")
    settings: Any = router_settings(words, monkeypatch)
    assert (settings.discovery, settings.kubernetes_namespace) == ("kubernetes", "serving")
    for found in objects_of("minimal"):
        component = found["metadata"]["labels"]["app.kubernetes.io/component"]
        if found["kind"] == "Deployment" and component != "router":
            selector = getattr(settings, f"kubernetes_selector_{component}")
            wanted = dict(pair.split("=") for pair in selector.split(","))
            template = found["spec"]["template"]
            assert wanted.items() <= template["metadata"]["labels"].items()
            assert settings.kubernetes_port in [port["name"] for port in template["spec"]["containers"][0]["ports"]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Namespace]]:
    """What vLLM's server would be started with: the engines' commands run up to there, vLLM's parser and checks too."""
    seen: list[Namespace] = []

    async def serve(args: Namespace) -> bool:
        seen.append(args)
        return False

    monkeypatch.setattr("services.vllm_server._serve", serve)
    for name in ENGINE_SETS:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_HOST_IP", POD_IP)
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", POD_IP)
    yield seen
    for name in ENGINE_SETS:
        os.environ.pop(name, None)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_engines_read_their_options(role: str, name: str, served: list[Namespace], tmp_path: Path) -> None:
    (words,) = words_of(name, role)
    # Folders of the pod, and what the kubelet fills in.
    if words[1].startswith("/"):
        words[1] = str(tmp_path)
    filled = {"$(LWS_WORKER_INDEX)": "0", "$(LWS_LEADER_ADDRESS)": POD_IP}
    for variable, value in filled.items():
        words = [word.replace(variable, value) for word in words]
    cli.app(args=words, standalone_mode=False)
    (args,) = served
    assert (args.host, args.port) == ("0.0.0.0", 8100 if role == "prefill" else 8200)
    assert args.shutdown_timeout > 0
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"
    if name == "everything":
        assert (args.tensor_parallel_size, args.seed, args.served_model_name) == (2, 20_000_000, ["a", "b"])
        assert (args.enable_prefix_caching, args.max_model_len) == (False, 4096)
        assert args.compilation_config.mode == 3


def test_the_cpu_profile_sets_what_serve_sets(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"small")
    defaults = vllm_options(str(tmp_path), True, ())
    for role in ("prefill", "decode"):
        (words,) = words_of("values-cpu", role)
        given = [part for word in words for part in word.split("=", 1)]
        assert set(defaults) <= set(given)


def test_each_option_of_the_values_is_one_of_the_router() -> None:
    """Null leaves an option out, and every other one is passed on by its own name."""
    (words,) = words_of("everything", "router")
    assert not [word for word in words if word.startswith("--max-requests-per-key")]
    assert "--no-continue-streams" in words


def test_the_model_is_written_before_the_engines_of_the_cpu_profile_start() -> None:
    written = [words for words in command_lines(objects_of("values-cpu")) if words[0] == "make-model"]
    assert [words[1] for words in written] == [values_of("values-cpu")["model"]] * 2


def test_values_files_that_the_docs_name_exist() -> None:
    root = CHART.parents[2]
    text = (root / "docs" / "install-kubernetes.md").read_text()
    named = set(re.findall(r"deploy/[\w/.-]+(?:yaml|cpu|cuda|tpl)\b", text))
    assert {root / name for name in named} >= {path for path in SETS.values() if "tests" not in path.parts}
    assert [name for name in named if not (root / name).exists()] == []


def test_nodes_other_than_the_first_run_the_same_command() -> None:
    (group,) = [found for found in objects_of("multi-node") if found["kind"] == "LeaderWorkerSet"]
    templates = group["spec"]["leaderWorkerTemplate"]
    leader, worker = (templates[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert leader["args"] == worker["args"]
    assert "--node-rank=$(LWS_WORKER_INDEX)" in worker["args"]
    assert leader["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/ib": 8}


def test_ray_gets_the_gpus_of_all_nodes() -> None:
    prefill = {"nodes": 2, "options": {"tensor-parallel-size": 16}}
    (group,) = [o for o in render({"model": "m", "prefill": prefill}) if o["kind"] == "LeaderWorkerSet"]
    leader = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
    assert "--distributed-executor-backend=ray" in leader["args"]
    assert leader["resources"]["limits"]["nvidia.com/gpu"] == 8
