"""The command line. Heavy imports stay inside the commands, so that `tknp --help` answers at once."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bench.cli import app as bench_app

if TYPE_CHECKING:
    from collections.abc import Iterator

_VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
_VLLM_EPILOG = "Every other option is vLLM's own and passed on as it is, for example --max-model-len 2048."

app = typer.Typer(
    name="tknp",
    help="Serve a large language model on vLLM with prefill and token-parallel decode on separate pools.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="Path of a model, or its name on the Hugging Face hub.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")]
TokenParallelSize = Annotated[
    int, typer.Option(min=1, help="Ranks that share a decode engine's KV cache; 1 is plain vLLM.")
]
SideChannelPort = Annotated[
    int | None,
    typer.Option(min=1, max=65_535, help="Port where other engines ask how to read this one's KV cache (NIXL)."),
]


KvBoth = Annotated[
    bool,
    typer.Option(
        "--kv-both",
        help="Keep KV cache for others and pull theirs: for a router's --flip-roles and --pull-back-tokens.",
    ),
]


@app.command(context_settings=_VLLM_OPTIONS, epilog=_VLLM_EPILOG)
def serve(
    context: typer.Context,
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    prefill_replicas: Annotated[int, typer.Option(min=1, help="Prefill engines to start.")] = 1,
    decode_replicas: Annotated[int, typer.Option(min=1, help="Decode engines to start.")] = 1,
    token_parallel_size: TokenParallelSize = 2,
    prefill_tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="--tensor-parallel-size of the prefill engines alone.")
    ] = None,
    decode_tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="--tensor-parallel-size of the decode engines alone.")
    ] = None,
    prefill_args: Annotated[str, typer.Option(help="vLLM options for prefill alone, in one string.")] = "",
    decode_args: Annotated[str, typer.Option(help="vLLM options for decode alone, in one string.")] = "",
    prompt: Annotated[str, typer.Option(help="What to ask once everything is up.")] = "What is the capital of France?",
    startup_timeout: Annotated[float, typer.Option(min=1, help="Seconds until everything must be up.")] = 900.0,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for the output of each process.", show_default="logs/serve-<port>")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Place engines and ranks on the nodes of a Ray cluster.")] = False,
) -> None:
    """Start everything on this machine.

    Prefill engines, decode engines and a router in front of them, until Ctrl-C.
    """
    from tknp.common.ports import PortError
    from tknp.launch.options import CannotServeError, ServeOptions
    from tknp.launch.serve import run_serve

    options = ServeOptions(
        model=_checked_model(model),
        host=host,
        port=port,
        prefill_replicas=prefill_replicas,
        decode_replicas=decode_replicas,
        token_parallel_size=token_parallel_size,
        vllm_args=tuple(context.args),
        prefill_args=_split(prefill_args, "--prefill-args", prefill_tensor_parallel_size),
        decode_args=_split(decode_args, "--decode-args", decode_tensor_parallel_size),
        prompt=prompt,
        startup_timeout=startup_timeout,
        log_dir=log_dir,
        ray=ray,
    )
    try:
        with _in_one_sentence():
            code = run_serve(options)
    except (CannotServeError, PortError) as error:
        _fail(str(error))
    raise typer.Exit(code)


# --help is left to the settings themselves: pydantic-settings writes it from their fields.
@app.command(context_settings={**_VLLM_OPTIONS, "help_option_names": []})
def router(context: typer.Context) -> None:
    """Start the router in front of running engines."""
    from pydantic import ValidationError
    from pydantic_settings import CliApp, CliSettingsSource, SettingsError

    from router.settings import RouterSettings

    source: CliSettingsSource[Any] = CliSettingsSource(
        RouterSettings,
        cli_prog_name="tknp router",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
    )
    try:
        settings = CliApp.run(RouterSettings, cli_args=list(context.args), cli_settings_source=source)
    except SettingsError as error:
        _fail(str(error).removeprefix("error parsing CLI: "))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        _fail((option and f"--{option}: ") + first["msg"].removeprefix("Value error, "))
    from router.app import run

    run(settings)


@app.command(context_settings=_VLLM_OPTIONS, epilog=_VLLM_EPILOG)
def prefill(
    context: typer.Context,
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8100,
    side_channel_port: SideChannelPort = None,
    kv_both: KvBoth = False,
) -> None:
    """Start one prefill engine.

    vLLM's OpenAI server, whose KV cache the decode engines read.
    """
    model = _checked_model(model)
    from services.prefill.service import run_prefill

    with _in_one_sentence():
        run_prefill(model, host, port, side_channel_port, list(context.args), kv_both)


@app.command(context_settings=_VLLM_OPTIONS, epilog=_VLLM_EPILOG)
def decode(
    context: typer.Context,
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8200,
    token_parallel_size: TokenParallelSize = 1,
    token_parallel_weights: Annotated[
        str,
        typer.Option(
            help="Where the weights are: 'root', on the roots alone, which leaves the other ranks all their memory for "
            "KV cache, or 'spread', divided among the workers of all ranks, for models with few KV heads."
        ),
    ] = "root",
    token_parallel_overlap_from: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Requests from which a decode step on GPUs runs in two micro-batches, the root's matrix products of "
            "one under the attention of the other; 0 is never.",
            show_default="chosen at each step, by what was measured at start",
        ),
    ] = None,
    side_channel_port: SideChannelPort = None,
    kv_both: KvBoth = False,
    nnodes: Annotated[int, typer.Option(min=1, help="Hosts that the ranks are spread over.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this is; 0 serves.")] = 0,
    master_addr: Annotated[str, typer.Option(help="Address of host 0, as the others reach it.")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(min=1, max=65_534, help="A free port there, the next one too.")] = 29501,
) -> None:
    """Start one decode engine.

    vLLM's OpenAI server, with its KV cache spread over token-parallel ranks. On several hosts, start the same command
    on each, with its own --node-rank.
    """
    model = _checked_model(model)
    from services.decode.service import run_decode
    from services.decode.token_parallel.options import Nodes, UnsupportedConfigurationError

    vllm_args = list(context.args)
    with _in_one_sentence():
        try:
            nodes = Nodes(nnodes, node_rank, master_addr, master_port) if nnodes > 1 else None
            overlap = token_parallel_overlap_from
            run_decode(
                model,
                host,
                port,
                token_parallel_size,
                side_channel_port,
                vllm_args,
                overlap,
                kv_both,
                nodes,
                token_parallel_weights,
            )
        except UnsupportedConfigurationError as error:
            _fail(str(error))


app.add_typer(bench_app, name="bench")


@app.command("make-model")
def make_model(
    directory: Annotated[Path, typer.Argument(help="Folder to write to; one that holds a model is left alone.")],
    shape: Annotated[str, typer.Option(help="llama or gemma2: which architecture.")] = "llama",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
) -> None:
    """Write a small model, without any download.

    Its weights are random: the text that it writes means nothing, but the path of a request is the real one.
    """
    from tknp.tiny_model import SHAPES, make_tiny_model

    if shape not in SHAPES:
        _fail(f"--shape is one of {', '.join(sorted(SHAPES))}, not {shape!r}")
    typer.echo(f"A small {shape} model with random weights is in {make_tiny_model(directory, shape, seed)}")


def _checked_model(model: str) -> str:
    # Unknown options are passed on, so an option in front of the model would be taken for the model.
    if model.startswith("-"):
        _fail(f"the model comes before vLLM's options, but the first argument is {model!r}")
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        _fail(f"there is no model folder {model!r}")
    return str(Path(model).expanduser()) if model.startswith("~") else model


def _split(text: str, option: str, tensor_parallel_size: int | None) -> tuple[str, ...]:
    import shlex

    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        _fail(f"{option} is not a well-formed list of options: {error}")
    return words if tensor_parallel_size is None else (*words, "--tensor-parallel-size", str(tensor_parallel_size))


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Shows errors that speak for themselves without a traceback."""
    from services.vllm_server import EngineDiedError
    from tknp.common.versions import VersionMismatchError

    try:
        yield
    except (VersionMismatchError, EngineDiedError) as error:
        raise typer.TyperException(str(error)) from error


class WrongUseError(typer.TyperException):
    """The command line asks for something that can't be."""

    exit_code = 2


def _fail(message: str) -> NoReturn:
    raise WrongUseError(message)


def main() -> None:
    """Runs the command line; wrong use ends with one sentence and exit code 2."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="tknp", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"tknp: {error.format_message()}", err=True)
        code = error.exit_code
    sys.exit(code)
