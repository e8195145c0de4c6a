"""`tknp bench …`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Benchmarks."""


class SpreadOptions(TyperCommand):
    """Lets a repeated option take several values at once: `--batch 1 64 256` for `--batch 1 --batch 64 --batch 256`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        name, is_first = "", False
        for arg in args:
            if arg.startswith("--"):
                name, is_first = arg, True
            elif name in repeated and not is_first:
                spread.append(name)
            else:
                is_first = False
            spread.append(arg)
        return list(super().parse_args(ctx, spread))


@app.command(cls=SpreadOptions)
def decode(
    shape: Annotated[str, typer.Option(help="8b, 8b-2kv or 32b-2kv: sizes of the model; weights are random.")] = "8b",
    context: Annotated[list[int], typer.Option(min=32, help="Tokens of KV cache of each sequence.")] = [8192],  # noqa: B006 - typer reads it
    setup: Annotated[
        list[str],
        typer.Option(help="tp4, dp4, dp2tp2, tp4dcp2, or ours as t1p4 and t2p2, also -serial and -piecewise."),
    ] = ["dp4", "tp4", "t1p4", "t2p2"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences at once, of all replicas together.")] = [256],  # noqa: B006
    steps: Annotated[int, typer.Option(min=32, help="Steps of each batch at each context.")] = 128,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth of one GPU in TB/s, for the floor.")] = 4.8,
    output: Annotated[Path | None, typer.Option(help="JSON file that the rows are added to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG or PNG file, drawn of all that --output holds.")] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder for each engine's output.")] = Path("logs/bench"),
    trace: Annotated[
        bool, typer.Option("--trace", help="Chrome traces in --log-dir, and a table of where a step's time goes.")
    ] = False,
) -> None:
    """Decode steps at full context: token parallelism against other uses of the same GPUs.

    Options that can be given several times take several values, as in --batch 1 64 256. An engine starts once for all
    of them.
    """
    from bench.decode import Measured, Plan, compare, differences, environment, table
    from bench.setups import Setup

    if plot is not None and output is None:
        raise typer.BadParameter("--plot draws what --output holds; give both")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'tknp[bench]'")
    known = json.loads(output.read_text()) if output is not None and output.exists() else {}
    setups = tuple(Setup.parse(name) for name in setup)
    plan = Plan(shape, tuple(context), setups, tuple(batch), log_dir, bandwidth * 1e12, steps, trace)
    measured = Measured()
    for measured in compare(plan):
        typer.echo(table(measured.rows) + "\n")
        if output is not None:  # after each setup, so that an interrupted run leaves what it had
            output.parent.mkdir(parents=True, exist_ok=True)
            record = {
                **known,
                "environment": environment(),
                "rows": known.get("rows", []) + [vars(row) for row in measured.rows],
                "starts": {**known.get("starts", {}), **measured.starts},
                "breakdowns": {**known.get("breakdowns", {}), **measured.breakdowns},
            }
            output.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(differences(measured.rows))
    for name, start in measured.starts.items():
        ready = f", its KV workers after {start['kv_worker_seconds']}" if "kv_worker_seconds" in start else ""
        typer.echo(f"{name}: ready after {start['engine_seconds']} s{ready}")
    if plot is not None and output is not None:
        from bench.plot import draw

        try:
            draw(json.loads(output.read_text())["rows"], plot)
        except ValueError as error:
            measured.refused.append(str(error))
    for reason in measured.left_out + measured.refused:
        typer.echo(reason, err=True)
    if measured.refused:
        raise typer.Exit(1)


@app.command()
def router(
    streams: Annotated[
        list[int], typer.Option(min=1, help="Streams at once; give it several times.", show_default="1, 64, 512, 2000")
    ] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=0, help="Runs of each load; medians and their spread are kept.")] = 3,
    cost_turns: Annotated[
        int,
        typer.Option(min=0, help="Turns that routers take, side by side: CPU of a request and a chunk, rate at 64."),
    ] = 5,
    hold: Annotated[
        float, typer.Option(min=0, help="Seconds that ours holds the most streams while its memory is watched.")
    ] = 120.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each load, at least.")] = 3.0,
    name: Annotated[
        list[str], typer.Option("--router", help="Only these: tknp, vllm-router, ...; give it several times.")
    ] = [],  # noqa: B006
    mode: Annotated[list[str], typer.Option(help="Only these: one-leg, two-leg.")] = [],  # noqa: B006
    num_engines: Annotated[
        int, typer.Option("--engines", min=1, help="So many of each kind, for the routers that choose among several.")
    ] = 1,
    router_args: Annotated[str, typer.Option(help="Options of `tknp router` for ours, in one string.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Ours alone, for seconds: whether it works.")] = False,
    peers_dir: Annotated[
        Path, typer.Option(help="Virtual environment for the routers to compare with; made if it is not there.")
    ] = Path(".venv-peers"),
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows, the summary and every run.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the runs that the file holds, and add to them.")] = False,
    log_dir: Annotated[Path, typer.Option(help="Folder for each router's output.")] = Path("logs/bench-router"),
) -> None:
    """Our router against others, in front of engines that cost nothing.

    Two cores: the router has one, client and engines the other.
    """
    import shlex
    from dataclasses import replace

    from bench.router.report import read, record, rows, table
    from bench.router.run import Comparison, Plan, compare

    plan = Plan(
        repeats=repeats,
        cost_turns=cost_turns,
        seconds=seconds,
        hold_seconds=hold,
        routers=tuple(name),
        modes=tuple(mode),
    )
    plan = Plan.quick() if quick else replace(plan, concurrencies=tuple(streams) or plan.concurrencies)
    plan = replace(plan, num_engines=num_engines, our_options=tuple(shlex.split(router_args)))
    plan = replace(plan, peers_dir=peers_dir, log_dir=log_dir)

    before, parts = read(output) if add and output is not None else ([], [])

    def keep(known: Comparison) -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            found = record([*before, *known.results], known.environment, parts)
            output.write_text(json.dumps(found, indent=1) + "\n")

    typer.echo(table(rows([*before, *compare(plan, typer.echo, keep).results])))


@app.command()
def transfer(
    path: Annotated[
        list[str], typer.Option(help="stock: vLLM's NixlConnector; nixl, direct, packed, packed+fp8: ours.")
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
    ahead: Annotated[
        bool,
        typer.Option(
            "--ahead", help="With --engines: the decode engine has the request before prefill ends, and pulls then."
        ),
    ] = False,
    sources: Annotated[
        int,
        typer.Option(min=1, help="With --engines: prefill engines, to see a first request with so many of them."),
    ] = 1,
    next_turn: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Real engines: a prefill engine pulls what a decode engine has of a prompt, and computes so many "
            "tokens more.",
        ),
    ] = None,
    beside: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=31,
            help="Real engines: what a hand-over costs so many others in time between tokens; chunks by "
            "--streamed-chunk.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
) -> None:
    """KV from one engine to another: vLLM's connector and ours."""
    from bench.decode import environment
    from bench.transfer.beside import beside_table, compare_beside
    from bench.transfer.compare import CASES, Plan, compare, table
    from bench.transfer.first_token import compare_first_tokens, first_token_table
    from bench.transfer.next_turn import compare_next_turns, next_turn_table

    plan = Plan(
        paths=tuple(path),
        shape=shape,
        block_size=block_size,
        cases=tuple((int(requests), int(tokens)) for requests, tokens in (one.split("x") for one in case)) or CASES,
        devices=None if devices == "cpu" else tuple(map(int, devices.split(","))),  # type: ignore[arg-type]
        repeats=repeats,
        link=link * 1e9 or None,
        streamed_chunk=streamed_chunk,
        ahead=ahead,
        sources=sources,
    )
    rows: list[Any] = []
    found: Any
    as_table: Any
    if beside is not None:
        found, as_table = compare_beside(plan, beside, typer.echo), beside_table
    elif next_turn is not None:
        found, as_table = compare_next_turns(plan, next_turn, typer.echo), next_turn_table
    elif engines:
        found, as_table = compare_first_tokens(plan, typer.echo), first_token_table
    else:
        found, as_table = compare(plan, typer.echo), table
    for row in found:
        rows.append(row)
        if output is not None:  # after each row, so that an interrupted run leaves what it had
            output.parent.mkdir(parents=True, exist_ok=True)
            record = {"environment": environment(), "rows": [vars(row) for row in rows]}
            output.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(as_table(rows))
