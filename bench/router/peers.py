"""The routers that are compared: how each is started, in which modes, and where the foreign ones are installed."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

REQUIREMENTS = (
    "vllm-router==0.1.17",
    "sglang-router==0.3.2",
    "fastapi==0.165.0",
    "httpx==0.28.1",
    "uvicorn==0.54.0",
    "uvloop==0.23.0",
    "httptools==0.9.0",
)
OURS = "tknp"
DIRECT = "direct"  # no router: what the client and the engine take by themselves
GUARD_SHARE = 0.01
_PROXIES = Path(__file__).parent / "proxies"


class Mode(StrEnum):
    """How many engines see a request."""

    ONE_LEG = "one-leg"  # the decode engine alone
    TWO_LEG = "two-leg"  # a prefill engine first


class PeersMissingError(RuntimeError):
    """The foreign routers can't be had."""


@dataclass(frozen=True)
class Start:
    """What a router's command line needs to know."""

    peers_python: Path
    port: int
    spare_port: int  # for its metrics
    prefill_urls: tuple[str, ...]
    decode_urls: tuple[str, ...]
    keys_file: Path
    our_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Router:
    """`command` makes the command line; `is_ours` needs no foreign package. With more than `most_streams` at once it is
    not measured: it does not hold its rate by far, and every load would last a minute. Nor is it with several engines,
    if it does not choose among them."""

    name: str
    mode: Mode
    command: Callable[[Start], list[str]]
    is_ours: bool = False
    most_streams: int | None = None
    chooses: bool = True


def _ours(start: Start) -> list[str]:
    """Everything that is off by default is on: keys, traces (the decode engine poses as their collector), the guard."""
    engines = [f"--prefill-urls={','.join(start.prefill_urls)}", f"--decode-urls={','.join(start.decode_urls)}"]
    traces = [f"--otlp-traces-endpoint={start.decode_urls[0]}/v1/traces", "--otlp-traces-protocol=http/protobuf"]
    extras = [f"--api-keys-file={start.keys_file}", *traces, f"--guard-share={GUARD_SHARE}"]
    command = [sys.executable, "-m", "tknp", "router", "--port", str(start.port)]
    return [*command, *engines, *extras, *start.our_options]


def _rust(module: str, pd_flag: str) -> Callable[[Start], list[str]]:
    def command(start: Start) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(start.port), "--prometheus-port", str(start.spare_port)]
        engines = ["--worker-urls", *start.decode_urls]
        if pd_flag:
            sides = ("--prefill", start.prefill_urls), ("--decode", start.decode_urls)
            engines = [pd_flag, *(word for flag, urls in sides for url in urls for word in (flag, url))]
        # Round robin, because "cache aware" would compare prompts, which the others don't do here.
        return [str(start.peers_python), "-m", module, *where, *engines, "--policy", "round_robin"]

    return command


def _script(name: str, with_prefill: bool) -> Callable[[Start], list[str]]:
    def command(start: Start) -> list[str]:
        urls = [start.prefill_urls[0], start.decode_urls[0]] if with_prefill else [start.decode_urls[0]]
        return [str(start.peers_python), str(_PROXIES / name), str(start.port), *urls]

    return command


def _ours_relay(start: Start) -> list[str]:
    return [sys.executable, str(_PROXIES / "relay.py"), str(start.port), start.decode_urls[0]]


ROUTERS = (
    Router(OURS, Mode.ONE_LEG, _ours, is_ours=True),
    Router("vllm-router", Mode.ONE_LEG, _rust("vllm_router.launch_router", "")),
    Router("sglang-router", Mode.ONE_LEG, _rust("sglang_router.launch_router", "")),
    Router(
        "fastapi-httpx", Mode.ONE_LEG, _script("fastapi_httpx.py", with_prefill=False), most_streams=64, chooses=False
    ),
    Router("packet-relay", Mode.ONE_LEG, _ours_relay, is_ours=True, chooses=False),
    Router(OURS, Mode.TWO_LEG, _ours, is_ours=True),
    Router("vllm-router", Mode.TWO_LEG, _rust("vllm_router.launch_router", "--vllm-pd-disaggregation")),
    Router("sglang-router", Mode.TWO_LEG, _rust("sglang_router.launch_router", "--pd-disaggregation")),
    Router("vllm-toy-proxy", Mode.TWO_LEG, _script("toy_pd.py", with_prefill=True), most_streams=64, chooses=False),
)


def install(directory: Path) -> Path:
    """The Python of a virtual environment that holds the peers, made if it is not there yet.

    Raises PeersMissingError with what pip said.
    """
    python = directory / "bin" / "python"
    stamp = directory / "peers.txt"
    if stamp.exists() and stamp.read_text().split() == list(REQUIREMENTS):
        return python
    try:
        venv.create(directory, with_pip=True)
        _run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS])
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise PeersMissingError(
            f"The routers to compare with can't be installed into {directory}: {''.join(said)}. "
            "Make the package index reachable, or measure only ours with --router tknp."
        ) from error
    stamp.write_text("\n".join(REQUIREMENTS) + "\n")
    return python


def versions(python: Path) -> dict[str, str]:
    """Name -> version of what the environment of the peers holds."""
    code = "from importlib.metadata import distributions as d; [print(x.name, x.version) for x in d()]"
    lines = _run([str(python), "-c", code]).splitlines()
    wanted = {requirement.split("==")[0] for requirement in REQUIREMENTS}
    return {name: version for name, version in (line.split() for line in lines) if name in wanted}


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
