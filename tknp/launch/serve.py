"""The life of `tknp serve`, top to bottom: start, wait until all is ready, one request, watch, stop."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from typing import TYPE_CHECKING

import aiohttp

from tknp.common.versions import check_vllm_version
from tknp.launch.child import Child
from tknp.launch.console import Console
from tknp.launch.first_request import FirstRequestError, send_first_request
from tknp.launch.plan import Role, plan_children
from tknp.launch.startup import Startup, StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tknp.launch.options import ServeOptions
    from tknp.launch.plan import ChildSpec


def run_serve(options: ServeOptions) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code.

    Raises:
        CannotServeError: the options can't be met on this machine; nothing was started.
        VersionMismatchError: the vLLM that is installed is not the one that this was built on.
    """
    check_vllm_version()
    # vLLM leaves sockets and files in the temporary folder, so its processes get one that ends with them.
    with tempfile.TemporaryDirectory(prefix="tknp-", ignore_cleanup_errors=True) as scratch:
        return asyncio.run(supervise(plan_children(options, scratch), options))


async def supervise(specs: Sequence[ChildSpec], options: ServeOptions) -> int:
    """Runs the processes, of which the first is the router, until a signal or until they can't serve any more."""
    console = Console()
    children = [Child(spec) for spec in specs]
    serving = asyncio.create_task(_serve(children, options, console))

    def ask_to_stop() -> None:
        if not serving.cancel():  # it was asked before
            for child in children:
                child.hurry()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, ask_to_stop)
    try:
        await serving
    except asyncio.CancelledError:
        return 0
    except StartupError:
        return 1
    else:
        return 1
    finally:
        await _stop(children, console)


async def _serve(children: Sequence[Child], options: ServeOptions, console: Console) -> None:
    """Returns when there is nothing left to serve with."""
    console.news(f"Starting {len(children)} processes for {options.model}; logs in {options.logs}")
    for child in children:
        await child.start()
        console.detail(f"{child.spec.name} at {child.spec.url}, log: {child.spec.log}")
    async with aiohttp.ClientSession() as session:
        await Startup(children, console, options.startup_timeout).wait(session)
        await _show_first_request(session, children[0].spec.url, options, console)
    console.news(f"Serving at {children[0].spec.url} until Ctrl-C")
    await _watch(children, console)


async def _show_first_request(
    session: aiohttp.ClientSession, url: str, options: ServeOptions, console: Console
) -> None:
    console.news(f"Everything is ready. A first request: {options.prompt}")
    try:
        request, path = await send_first_request(session, url, options.prompt, console.piece)
    except (FirstRequestError, aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
        console.piece("\n")
        console.news(f"The first request failed: {error or type(error).__name__}")
        return
    console.piece("\n")
    console.news("The path that it took:")
    for line in path:
        console.detail(line)
    console.news("Ask it yourself:")
    console.piece(f"{request.curl(url)}\n")


async def _watch(children: Sequence[Child], console: Console) -> None:
    """Returns when the router has ended, or the last engine of a role."""
    alive = {asyncio.create_task(child.wait()): child for child in children}
    while True:
        ended, _ = await asyncio.wait(alive, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            console.death(alive.pop(task), "while serving")
        lost = [role for role in Role if role not in {child.spec.role for child in alive.values()}]
        if lost:
            console.news(
                " and ".join("the router is gone" if r is Role.ROUTER else f"no {r} engine is left" for r in lost)
            )
            return
        console.news(f"Going on with {', '.join(child.spec.name for child in alive.values())}")


async def _stop(children: Sequence[Child], console: Console) -> None:
    """Returns when no process is left."""
    running = [child.spec.name for child in children if child.is_running]
    if running:
        console.news(f"Stopping {', '.join(running)}")
    # The router first: it ends its requests while the engines can still answer them.
    for is_router in (True, False):
        await asyncio.gather(*(child.stop() for child in children if (child.spec.role is Role.ROUTER) is is_router))
    console.news("All processes have ended")
