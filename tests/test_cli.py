"""The command line, run as users run it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tknp import cli
from tknp.common.versions import VersionMismatchError

if TYPE_CHECKING:
    from pathlib import Path


def tknp(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tknp", *words], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_the_commands(words: list[str]) -> None:
    ended = tknp(*words)
    assert ended.returncode == 0
    for command in ("serve", "router", "prefill", "decode", "make-model"):
        assert f"\n  {command} " in ended.stdout


@pytest.mark.parametrize("command", ["serve", "prefill", "decode", "router"])
def test_help_of_a_command_names_its_options(command: str) -> None:
    ended = tknp(command, "--help")
    assert ended.returncode == 0
    assert "--port" in ended.stdout
    assert ("vLLM's own" in ended.stdout) is (command != "router")


def test_a_secret_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TKNP_ROUTER_ENGINE_API_KEY", "sk-engine-s3cret ")  # the space makes it wrong
    keys = tmp_path / "keys"
    keys.write_text("sk-client-s3cret with-a-space")
    for words in ([], ["--help"], ["--api-keys-file", str(keys)]):
        ended = tknp("router", *words)
        assert ended.returncode == (0 if "--help" in words else 2)
        assert "s3cret" not in ended.stdout + ended.stderr


def test_help_imports_nothing_heavy() -> None:
    source = "import sys, tknp.cli; print([n for n in ('torch', 'vllm', 'aiohttp', 'fastapi') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", source], text=True, timeout=120).strip() == "[]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sing"], "No such command 'sing'"),
        (["decode"], "Missing argument"),
        (["decode", "--max-model-len", "9", "m"], "the model comes before vLLM's options"),
        (["decode", "./no-such-model"], "there is no model folder './no-such-model'"),
        (["decode", "m", "--token-parallel-size", "0"], "--token-parallel-size"),
        (["serve", "m", "--port", "70000"], "'--port'"),
        (["serve", "m", "--prefill-args", "'"], "--prefill-args is not a well-formed list of options"),
        (["serve", "m", "--host", "192.0.2.1"], "--host 192.0.2.1 is no address of this machine"),
        (["router", "--nope"], "unrecognized arguments: --nope"),
        (["router", "--port", "x"], "--port: "),
        (["router", "--prefill-urls", "nonsense"], "--prefill-urls: an engine is http://host:port"),
        (["router", "--api-keys-file", "/none"], "--api-keys-file: Path does not point to a file"),
        (["router", "--ssl-keyfile", __file__], "--ssl-keyfile and --ssl-ca-certs need --ssl-certfile"),
        (["router", "--ssl-certfile", __file__], "can't be used"),
        (["router", "--allowed-engine-hosts", "10.0.0.0/99"], "--allowed-engine-hosts: a host is a name"),
        (
            ["make-model", "folder", "--shape", "gpt"],
            "--shape is one of gemma2, llama, mixtral, multi_query, two_kv_heads, not 'gpt'",
        ),
    ],
)
def test_wrong_use_ends_with_one_sentence(words: list[str], sentence: str) -> None:
    ended = tknp(*words)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert ended.stderr.startswith("tknp: ")
    assert ended.stderr.count("\n") == 1


def called_with(monkeypatch: pytest.MonkeyPatch, target: str, words: list[str]) -> tuple[Any, ...]:
    """The arguments that `target` gets from a command line."""
    calls: list[tuple[Any, ...]] = []

    def record(*args: Any) -> int:
        calls.append(args)
        return 0

    monkeypatch.setattr(target, record)
    monkeypatch.setattr(sys, "argv", ["tknp", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return calls[0]


def test_vllms_options_pass_through_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--max-model-len", "2048", "--hf-overrides", '{"a": [1, "--port"]}', "--enforce-eager", "-tp=2", "-O3"]
    words = ["decode", "m", "--port", "9", *options[:3], "--token-parallel-size", "2", *options[3:]]
    args = called_with(monkeypatch, "services.decode.service.run_decode", words)
    assert args == ("m", "127.0.0.1", 9, 2, None, options, None, False, None, "root")
    args = called_with(
        monkeypatch, "services.prefill.service.run_prefill", ["prefill", "m", "--side-channel-port", "7", *options]
    )
    assert args == ("m", "127.0.0.1", 8100, 7, options, False)


def test_an_error_of_the_engine_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_decode(*_: Any) -> None:
        raise VersionMismatchError("vLLM is too old")

    monkeypatch.setattr("services.decode.service.run_decode", run_decode)
    monkeypatch.setattr(sys, "argv", ["tknp", "decode", "m"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (1, "tknp: vLLM is too old\n")


def test_serve_gathers_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = [
        "serve",
        str(tmp_path),
        "--decode-replicas",
        "2",
        "--decode-tensor-parallel-size",
        "4",
        "--dtype",
        "float32",
    ]
    (options,) = called_with(monkeypatch, "tknp.launch.serve.run_serve", [*words, "--prefill-args", "--seed '1 2'"])
    assert (options.model, options.port, options.token_parallel_size) == (str(tmp_path), 8000, 2)
    assert (options.prefill_replicas, options.decode_replicas) == (1, 2)
    assert options.vllm_args == ("--dtype", "float32")
    assert options.prefill_args == ("--seed", "1 2")
    assert options.decode_args == ("--tensor-parallel-size", "4")


def test_the_router_gets_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "router",
        "--prefill-urls",
        "http://a:1,http://b:2",
        "--decode-urls",
        "http://c:3",
        "--no-record-transfers",
    ]
    (settings,) = called_with(monkeypatch, "router.app.run", words)
    assert settings.prefill_urls == ("http://a:1", "http://b:2")
    assert settings.decode_urls == ("http://c:3",)
    assert settings.record_transfers is False
