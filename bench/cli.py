"""`tknp bench …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Benchmarks."""


@app.command()
def decode(
    shape: Annotated[str, typer.Option(help="8b, 8b-2kv or 32b-2kv: sizes of the model; weights are random.")] = "8b",
    context: Annotated[int, typer.Option(min=32, help="Tokens of KV cache of each sequence.")] = 8192,
    setup: Annotated[
        list[str], typer.Option(help="tp4, dp4, dp2tp2, tp4dcp2, or ours as t1p4 and t2p2; give it several times.")
    ] = ["dp4", "tp4", "t1p4", "t2p2"],  # noqa: B006 - typer reads it
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences at once, of all replicas together.")] = [256],  # noqa: B006
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth of one GPU in TB/s, for the floor.")] = 4.8,
    output: Annotated[Path | None, typer.Option(help="JSON file that the rows are added to.")] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder for each engine's output.")] = Path("logs/bench"),
    trace: Annotated[
        bool, typer.Option("--trace", help="Chrome traces in --log-dir, and a table of where a step's time goes.")
    ] = False,
) -> None:
    """Decode steps at full context: token parallelism against other uses of the same GPUs."""
    from bench.decode import breakdowns, compare, environment, table
    from bench.setups import Setup

    known = json.loads(output.read_text()) if output is not None and output.exists() else {}
    setups = [Setup.parse(name) for name in setup]
    for rows in compare(shape, context, setups, batch, bandwidth * 1e12, log_dir, trace):
        typer.echo(table(rows) + "\n")
        if output is not None:  # after each setup, so that an interrupted run leaves what it had
            output.parent.mkdir(parents=True, exist_ok=True)
            record = {
                "environment": environment(),
                "rows": known.get("rows", []) + [vars(row) for row in rows],
                "breakdowns": {**known.get("breakdowns", {}), **breakdowns(shape, context, setups, log_dir)},
            }
            output.write_text(json.dumps(record, indent=1) + "\n")


@app.command()
def router(
    streams: Annotated[
        list[int], typer.Option(min=1, help="Streams at once; give it several times.", show_default="1, 64, 512, 2000")
    ] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each load; medians and their spread are kept.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each load, at least.")] = 3.0,
    name: Annotated[
        list[str], typer.Option("--router", help="Only these: tknp, vllm-router, ...; give it several times.")
    ] = [],  # noqa: B006
    mode: Annotated[list[str], typer.Option(help="Only these: one-leg, two-leg.")] = [],  # noqa: B006
    router_args: Annotated[str, typer.Option(help="Options of `tknp router` for ours, in one string.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Ours alone, for seconds: whether it works.")] = False,
    peers_dir: Annotated[
        Path, typer.Option(help="Virtual environment for the routers to compare with; made if it is not there.")
    ] = Path(".venv-peers"),
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows, the summary and every run.")] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder for each router's output.")] = Path("logs/bench-router"),
) -> None:
    """Our router against others, in front of engines that cost nothing.

    Two cores: the router has one, client and engines the other.
    """
    import shlex
    from dataclasses import replace

    from bench.router.report import record, rows, table
    from bench.router.run import Comparison, Plan, compare

    plan = Plan(repeats=repeats, seconds=seconds, routers=tuple(name), modes=tuple(mode))
    plan = Plan.quick() if quick else replace(plan, concurrencies=tuple(streams) or plan.concurrencies)
    plan = replace(plan, our_options=tuple(shlex.split(router_args)), peers_dir=peers_dir, log_dir=log_dir)

    def keep(known: Comparison) -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record(known.results, known.environment), indent=1) + "\n")

    typer.echo(table(rows(compare(plan, typer.echo, keep).results)))


@app.command()
def transfer(
    path: Annotated[
        list[str], typer.Option(help="stock: vLLM's NixlConnector; nixl, direct: ours, on these paths.")
    ] = ["stock", "direct"],  # noqa: B006 - typer reads it
    shape: Annotated[str, typer.Option(help="tiny, 8b, 8b-2kv or 32b-2kv: sizes of the KV cache.")] = "8b",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block; the CPU needs multiples of 32.")] = 16,
    case: Annotated[
        list[str],
        typer.Option(help="Requests x tokens of each; give it several times.", show_default="1x8192, 1x32768, 8x8192"),
    ] = [],  # noqa: B006
    devices: Annotated[str, typer.Option(help="CUDA devices of prefill and decode side, or cpu.")] = "0,1",
    repeats: Annotated[int, typer.Option(min=1, help="Transfers of each case; medians are kept.")] = 7,
    link: Annotated[float, typer.Option(help="GB/s one way, which nothing can beat; 0 to believe any result.")] = 450.0,
    engines: Annotated[
        bool, typer.Option("--engines", help="Real engines with random weights, and the time to their first token.")
    ] = False,
    streamed_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="With --engines: pull while prefill computes, so many tokens in a step."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
) -> None:
    """KV from one engine to another: vLLM's connector and ours."""
    from bench.decode import environment
    from bench.transfer.compare import CASES, Plan, compare, table
    from bench.transfer.first_token import compare_first_tokens, first_token_table

    plan = Plan(
        paths=tuple(path),
        shape=shape,
        block_size=block_size,
        cases=tuple((int(requests), int(tokens)) for requests, tokens in (one.split("x") for one in case)) or CASES,
        devices=None if devices == "cpu" else tuple(map(int, devices.split(","))),  # type: ignore[arg-type]
        repeats=repeats,
        link=link * 1e9 or None,
        streamed_chunk=streamed_chunk,
    )
    rows: list[Any] = []
    for row in compare_first_tokens(plan, typer.echo) if engines else compare(plan, typer.echo):
        rows.append(row)
        if output is not None:  # after each row, so that an interrupted run leaves what it had
            output.parent.mkdir(parents=True, exist_ok=True)
            record = {"environment": environment(), "rows": [vars(row) for row in rows]}
            output.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(first_token_table(rows) if engines else table(rows))
