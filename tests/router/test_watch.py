from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from router.watch import WatchedFile

INTERVAL = 0.01  # s


def test_every_kind_of_change_is_noticed(tmp_path: Path) -> None:
    """Written, replaced, swapped behind a symbolic link as Kubernetes does, gone, and back."""
    asyncio.run(_every_kind(tmp_path))


async def _every_kind(folder: Path) -> None:
    real, link = folder / "one", folder / "link"
    real.write_text("1")
    (folder / "two").write_text("2")
    link.symlink_to(real)
    changes: asyncio.Queue[None] = asyncio.Queue()
    file = WatchedFile(link)
    real.write_text("changed before anybody watched")

    watching = asyncio.create_task(file.watch(INTERVAL, lambda: changes.put(None)))
    try:
        await asyncio.wait_for(changes.get(), 10)
        real.write_text("11")
        await asyncio.wait_for(changes.get(), 10)
        (folder / "next").symlink_to(folder / "two")
        (folder / "next").rename(link)
        await asyncio.wait_for(changes.get(), 10)
        link.unlink()
        await asyncio.wait_for(changes.get(), 10)
        link.write_text("3")
        await asyncio.wait_for(changes.get(), 10)
        await asyncio.sleep(10 * INTERVAL)
        while not changes.empty():  # the last write may have been seen half done
            changes.get_nowait()
        await asyncio.sleep(10 * INTERVAL)
        assert changes.empty()
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
