"""From options to command lines."""

from __future__ import annotations

import dataclasses
import socket
import sys
from pathlib import Path

import pytest

from tknp.common.ports import choose_ports
from tknp.launch.defaults import environment, is_given, is_small, vllm_options
from tknp.launch.options import CannotServeError, ServeOptions
from tknp.launch.places import Place
from tknp.launch.plan import ChildSpec, Role, plan_children


@pytest.fixture
def options() -> ServeOptions:
    return ServeOptions(
        model="some/model",
        host="127.0.0.1",
        port=choose_ports(1)[0],
        prefill_replicas=1,
        decode_replicas=2,
        token_parallel_size=3,
        vllm_args=("--max-model-len", "512"),
        prefill_args=("--seed", "1"),
        decode_args=(),
        prompt="",
        startup_timeout=1.0,
        log_dir=None,
    )


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tknp.launch.plan.is_cpu_build", lambda: True)


def option(child: ChildSpec, name: str) -> str:
    return child.command[child.command.index(name) + 1]


def test_every_engine_gets_its_own_name_ports_log_and_options(options: ServeOptions) -> None:
    router, prefill, *decodes = plan_children(options, "/scratch")
    assert [child.name for child in (router, prefill, *decodes)] == ["router", "prefill-0", "decode-0", "decode-1"]
    assert [child.role for child in decodes] == [Role.DECODE, Role.DECODE]
    assert router.command[:4] == (sys.executable, "-m", "tknp", "router")
    assert option(router, "--prefill-urls") == prefill.url
    assert option(router, "--decode-urls") == f"{decodes[0].url},{decodes[1].url}"
    assert prefill.environment["TMPDIR"] == "/scratch"
    assert option(prefill, "--seed") == "1"
    assert "--seed" not in decodes[0].command
    assert "--token-parallel-size" not in prefill.command
    for decode in decodes:
        assert option(decode, "--token-parallel-size") == "3"
        assert option(decode, "--max-model-len") == "512"
    ports = [option(child, name) for child in (prefill, *decodes) for name in ("--port", "--side-channel-port")]
    assert len(set(ports)) == 6
    assert decodes[1].log == Path("logs") / f"serve-{options.port}" / "decode-1.log"


def test_a_taken_port_is_refused(options: ServeOptions) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(CannotServeError, match=f"port {port} is in use"):
            plan_children(dataclasses.replace(options, port=port), "/scratch")


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:{}"), ("0.0.0.0", "http://127.0.0.1:{}"), ("::1", "http://[::1]:{}")],
)
def test_the_url_can_be_reached(options: ServeOptions, host: str, url: str) -> None:
    router, *_ = plan_children(dataclasses.replace(options, host=host), "/scratch")
    assert router.url == url.format(options.port)


def test_gpus_are_disjoint_and_counted_with_both_kinds_of_parallelism(
    options: ServeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tknp.launch.plan.is_cpu_build", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7,8,9,10,11,12")
    four = dataclasses.replace(options, decode_args=("-tp", "2"))
    _, prefill, *decodes = plan_children(four, "/scratch")
    assert prefill.environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert [child.environment["CUDA_VISIBLE_DEVICES"] for child in decodes] == ["1,2,3,4,5,6", "7,8,9,10,11,12"]
    assert "--enforce-eager" not in prefill.command
    with pytest.raises(CannotServeError, match=r"need 26 GPUs \(2 \+ 12 \+ 12\) and this machine offers 13"):
        plan_children(
            dataclasses.replace(options, vllm_args=("--tensor_parallel_size=2",), decode_args=("-tp", "4")), "/scratch"
        )


@pytest.mark.parametrize(("ranks", "asked"), [(3, ([1], [3, 3])), (1, ([1, 1, 1], []))])
def test_on_ray_only_an_engine_with_ranks_spreads_over_nodes(
    options: ServeOptions, monkeypatch: pytest.MonkeyPatch, ranks: int, asked: tuple[list[int], list[int]]
) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def places(on_one_node: list[int], of_ranks: list[int]) -> list[Place]:
        seen.append((on_one_node, of_ranks))
        return [Place(f"10.0.0.{i}", 1000 + i, 2000 + i) for i, _ in enumerate([*on_one_node, *of_ranks])]

    monkeypatch.setattr("tknp.launch.plan.ray_places", places)
    _, prefill, *decodes = plan_children(dataclasses.replace(options, ray=True, token_parallel_size=ranks), "/scratch")
    assert seen == [asked]
    assert prefill.url == "http://10.0.0.0:1000"
    assert [child.url for child in decodes] == ["http://10.0.0.1:1001", "http://10.0.0.2:1002"]
    assert ["--distributed-executor-backend" in child.command for child in decodes] == [ranks > 1] * 2


def test_a_tensor_parallel_size_that_is_no_number_is_refused(options: ServeOptions) -> None:
    with pytest.raises(CannotServeError, match="--tensor-parallel-size is a positive number, not 'two'"):
        plan_children(dataclasses.replace(options, vllm_args=("--tensor-parallel-size", "two")), "/scratch")


@pytest.mark.parametrize(
    "words", [["--block-size", "64"], ["--block-size=64"], ["--block_size", "64"], ["--no-block-size"]]
)
def test_an_option_counts_as_given_however_it_is_written(words: list[str]) -> None:
    assert is_given("--block-size", words)
    assert not is_given("--block", words)


def test_defaults_yield_to_the_user(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    model = str(tmp_path)
    assert is_small(model)
    ours = vllm_options(model, True, ["--no-enforce-eager", "--dtype=bfloat16"])
    assert ours == ["--block-size", "32", "--max-num-seqs", "32", "--max-model-len", "2048"]
    assert vllm_options("some/model", False, []) == []
    variables = environment(model, True, {"OMP_NUM_THREADS": "8"})
    assert variables["OMP_NUM_THREADS"] == "8"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment("some/model", True, {})
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(model, False, {})
