"""Does the direct path copy the right bytes, and how fast, with nothing of vLLM around it?

    python -m bench.transfer.check OUTPUT_DIR [pages] [bandwidth] [death]

Two processes, each seeing one GPU: a source that shares its memory, and a destination that maps and reads it.
    pages      random bytes, random lists of blocks, several page sizes and both orders of layers and blocks; the whole
               destination is compared bit for bit, and so is the source afterwards
    bandwidth  copies of one engine's KV cache to the other's at different launch shapes, both directions
    death      the source is killed while it is read
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.transfer.peer import Cache, Peer, share_caches

SECONDS = {"pages": 60.0, "bandwidth": 100.0, "death": 40.0}
"""After which a part is given up."""


# -- the two processes --


def _destination(device: int, pipe: Any, part: str, output: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    with (output / f"check-{part}.jsonl").open("w") as file:
        for row in PARTS[part](pipe):
            file.write(json.dumps(row) + "\n")
            file.flush()


# -- pages --


def check_pages(pipe: Any) -> list[dict[str, Any]]:
    """Raises AssertionError for the first byte in the wrong place."""
    import torch

    from kv_transfer.direct.launch import BulkShape, TileShape
    from kv_transfer.direct.pages import PageList
    from kv_transfer.direct.transfer import PageCopier

    copiers = {type(shape).__name__: PageCopier("cuda", shape) for shape in (TileShape(), BulkShape())}
    rng, rows = np.random.default_rng(int.from_bytes(os.urandom(4))), []
    for page_bytes in (65536, 18432, 48):
        for blocks_first in (False, True):
            cache = Cache(6, 700, page_bytes, blocks_first)
            seed = int(rng.integers(1 << 30))
            peer = Peer(pipe, cache, seed)
            source = cache.pages(cache.allocate(seed))
            for num_blocks, (kernel, copier) in itertools.product((1, 17, 512), copiers.items()):
                local = cache.allocate(seed + 1)
                blocks = [rng.permutation(cache.num_blocks)[:num_blocks] for _ in range(2)]
                source_ids, ids = cache.ids(blocks[0]), cache.ids(blocks[1])
                expected = cache.pages(local).clone()
                to, origin = (torch.from_numpy(np.asarray(i)).cuda().long() for i in (ids, source_ids))
                expected[to] = source[origin]
                torch.cuda.synchronize()
                transfer = copier.start(peer.pages, source_ids, PageList(cache.descriptors(local.data_ptr())), ids)
                transfer.wait()
                assert torch.equal(cache.pages(local), expected), (kernel, page_bytes, blocks_first, num_blocks)
                assert transfer.telemetry().totalBytes == len(ids) * page_bytes
                rows.append({"kernel": kernel, "page_bytes": page_bytes, "blocks": num_blocks})
            if blocks_first:
                assert peer.is_unchanged(), "the source was written to"
            else:
                peer.close()
    for copier in copiers.values():
        rows += [_check_mixed_lengths(pipe, copier), _check_lists_that_nobody_keeps(pipe, copier, rng)]
    return rows


def _check_mixed_lengths(pipe: Any, copier: Any) -> dict[str, Any]:
    """Two caches of different page sizes in one list, as with an indexer's cache beside the attention's."""
    import torch

    from kv_transfer.direct.pages import PageList

    wide, narrow = Cache(4, 100, 18432), Cache(4, 100, 2112)
    total = Cache(1, 1, (wide.page_bytes + narrow.page_bytes) * 400)
    peer = Peer(pipe, total, 5)
    source, local = total.allocate(5), total.allocate(6)
    expected = local.clone()
    torch.cuda.synchronize()

    def rows(base: int) -> Any:
        return np.concatenate((wide.descriptors(base), narrow.descriptors(base + wide.page_bytes * 400)))

    theirs = PageList(rows(int(peer.pages.addresses[0])))
    both = wide.ids(np.arange(0, 100, 3)), narrow.ids(np.arange(0, 100, 7))
    ids = np.concatenate((np.asarray(both[0]), 400 + np.asarray(both[1])))
    copier.start(theirs, ids, PageList(rows(local.data_ptr())), ids).wait()
    offsets = rows(0)[ids]
    for address, length, _ in offsets.astype(np.int64):
        part = slice(address // 4, (address + length) // 4)
        expected[part] = source[part]
    assert torch.equal(local, expected), "mixed lengths"
    peer.close()
    return {"mixed_lengths": True}


def _check_lists_that_nobody_keeps(pipe: Any, copier: Any, rng: Any) -> dict[str, Any]:
    """Many copies at once, each from a list of its own, as with slots of a staging buffer."""
    import torch

    from kv_transfer.direct.pages import PageList

    cache = Cache(8, 512, 65536)
    peer = Peer(pipe, cache, 7)
    source, local = cache.pages(cache.allocate(7)), cache.allocate(8)
    ours, expected = PageList(cache.descriptors(local.data_ptr())), cache.pages(local).clone()
    orders = [rng.permutation(len(source)).astype(np.int32).reshape(64, -1) for _ in range(2)]
    expected[torch.from_numpy(orders[1].reshape(-1)).cuda().long()] = source[orders[0].reshape(-1)]
    torch.cuda.synchronize()
    rows = np.stack((peer.pages.addresses, peer.pages.lengths), axis=1)
    row = np.arange(orders[0].shape[1], dtype=np.int32)
    started = [copier.start(PageList(rows[a]), row, ours, b) for a, b in zip(*orders, strict=True)]
    started[-1].wait()
    assert torch.equal(cache.pages(local), expected), "lists that nobody keeps"
    peer.close()
    return {"lists_that_nobody_keeps": len(started)}


# -- bandwidth --


def measure_bandwidth(pipe: Any) -> Iterator[dict[str, Any]]:
    """Yields each figure as soon as it is known."""
    import torch

    from kv_transfer.direct.launch import BulkShape, TileShape
    from kv_transfer.direct.pages import PageList
    from kv_transfer.direct.transfer import PageCopier

    cache = Cache(32, 8193, 65536)
    peer = Peer(pipe, cache, 1)
    local = cache.allocate(2)
    ours = PageList(cache.descriptors(local.data_ptr()))
    torch.cuda.synchronize()
    rng = np.random.default_rng(0)
    yield {"what": "copy engine", "gigabytes_per_second": _copy_engine(peer, local)}

    def timed(copier: Any, tokens: int, requests: int, fragmented: bool, repeats: int, push: bool = False) -> Any:
        walls, kernels = [], []
        for _ in range(repeats + 1):
            pulls = [_block_ids(cache, rng, tokens, requests, fragmented) for _ in range(2)]
            torch.cuda.synchronize()
            begin = time.perf_counter()
            started = [
                copier.start(ours, b, peer.pages, a) if push else copier.start(peer.pages, a, ours, b)
                for a, b in zip(*pulls, strict=True)
            ]
            while not all(transfer.is_done() for transfer in started):
                pass
            walls.append(time.perf_counter() - begin)
            kernels.append(sum(transfer.telemetry().xferDuration for transfer in started) / 1e6)
        gigabytes = requests * tokens * cache.num_layers * cache.page_bytes / 16 / 1e9
        rate = [gigabytes / seconds for seconds in walls[1:]]
        return {
            "case": f"{requests}x{tokens}{' fragmented' if fragmented else ''}{' push' if push else ''}",
            "gigabytes_per_second": round(statistics.median(rate), 1),
            "least": round(min(rate), 1),
            "most": round(max(rate), 1),
            "kernel_gigabytes_per_second": round(gigabytes / statistics.median(kernels[1:]), 1),
            "post_ms": round(started[0].telemetry().postDuration / 1e3, 3),
        }

    shapes: list[Any] = [BulkShape(n, c << 10, s) for c, s in ((16, 8), (32, 6), (8, 16)) for n in (8, 16, 24, 32, 64)]
    shapes += [BulkShape(n, c << 10, s) for c, s in ((16, 4), (16, 12)) for n in (16, 32, 132)]
    shapes += [TileShape(n, 32 << 10, w) for w in (8, 16) for n in (32, 64, 132, 264)]
    shapes += [TileShape(n, 16 << 10, 4) for n in (132, 528, 1056)]
    best: dict[type, tuple[float, Any]] = {}
    for shape in shapes:
        row = timed(PageCopier("cuda", shape), 8192, 1, True, 4)
        rate = row["kernel_gigabytes_per_second"]
        best[type(shape)] = max(best.get(type(shape), (0.0, shape)), (rate, shape), key=lambda found: found[0])
        yield {"what": "shape", "kernel": type(shape).__name__, **asdict(shape), **row}
    for _, shape in best.values():
        copier = PageCopier("cuda", shape)
        yield {"what": "push", "kernel": type(shape).__name__, **timed(copier, 8192, 1, True, 4, push=True)}
        for tokens, requests in ((8192, 1), (32768, 1), (8192, 8)):
            for fragmented in (False, True):
                row = timed(copier, tokens, requests, fragmented, 7)
                yield {"what": "case", "kernel": type(shape).__name__, **asdict(shape), **row}
        yield {"what": "beside", "kernel": type(shape).__name__} | _beside_a_model(copier, peer, ours, cache)
    peer.close()


def _block_ids(cache: Cache, rng: Any, tokens: int, requests: int, fragmented: bool) -> list[Any]:
    """Pages of each request's blocks of 16 tokens; a fresh pool gives them in order, a used one anyhow."""
    blocks = tokens // 16
    pool = rng.permutation(cache.num_blocks) if fragmented else np.arange(cache.num_blocks)
    return [cache.ids(pool[i * blocks : (i + 1) * blocks]) for i in range(requests)]


def _copy_engine(peer: Peer, local: Any) -> list[float]:
    """Gigabytes per second of one plain copy of 4 GiB: what the link gives."""
    import ctypes

    import torch

    driver, size, rates = ctypes.CDLL("libcuda.so.1"), 4 << 30, []
    driver.cuMemcpyDtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    for _ in range(4):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        driver.cuMemcpyDtoDAsync_v2(local.data_ptr(), int(peer.pages.addresses[0]), size, None)
        end.record()
        end.synchronize()
        rates.append(round(size / 1e6 / begin.elapsed_time(end), 1))
    return rates


def _beside_a_model(copier: Any, peer: Peer, ours: Any, cache: Cache) -> dict[str, Any]:
    """What a copy costs kernels that run at the same time: a matrix product, and a pass over memory."""
    import torch

    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    ids = cache.ids(np.arange(2048))
    result: dict[str, Any] = {}
    kinds: dict[str, Callable[[], Any]] = {"product": lambda: a @ a, "memory": lambda: x.add_(1)}
    for name, work in kinds.items():
        for beside in (False, True):
            work()
            torch.cuda.synchronize()
            transfer = copier.start(peer.pages, ids, ours, ids) if beside else None
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(20):
                work()
            end.record()
            end.synchronize()
            torch.cuda.synchronize()
            result[name + ("_beside_ms" if beside else "_ms")] = round(begin.elapsed_time(end), 3)
            if transfer is not None:
                result[name + "_copy_ms"] = round(transfer.telemetry().xferDuration / 1e3, 3)
    return result


# -- death --


def read_from_the_dead(pipe: Any) -> list[dict[str, Any]]:
    """Reads on while the source is killed; this process must live, and its own GPU work too."""
    import torch

    from kv_transfer.direct.pages import PageList
    from kv_transfer.direct.transfer import PageCopier

    cache = Cache(32, 1024, 65536)
    peer = Peer(pipe, cache, 1)
    local = cache.allocate(2)
    ours, copier, ids = PageList(cache.descriptors(local.data_ptr())), PageCopier("cuda"), cache.ids(np.arange(1024))
    copier.start(peer.pages, ids, ours, ids).wait()
    expected = local.clone()
    threading.Timer(2.0, os.kill, (peer.process, signal.SIGKILL)).start()
    result: dict[str, Any] = {"copies": 0, "error": None, "equal_after": None}
    deadline = time.monotonic() + 8
    try:
        while time.monotonic() < deadline:
            copier.start(peer.pages, ids, ours, ids).wait()
            result["copies"] += 1
        result["equal_after"] = bool(torch.equal(local, expected))
        torch.randn(1024, 1024, device="cuda").sum().item()
    except RuntimeError as error:
        result["error"] = str(error).splitlines()[0]
    return [result]


PARTS: dict[str, Callable[[Any], Iterable[dict[str, Any]]]] = {
    "pages": check_pages,
    "bandwidth": measure_bandwidth,
    "death": read_from_the_dead,
}


def run_part(part: str, output: Path) -> bool:
    """Whether it ended by itself, in time, and well."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    source = context.Process(target=share_caches, args=(0, theirs), daemon=True)
    destination = context.Process(target=_destination, args=(1, ours, part, output), daemon=True)
    source.start()
    destination.start()
    deadline = time.monotonic() + SECONDS[part]
    while destination.is_alive() and time.monotonic() < deadline and (source.is_alive() or part == "death"):
        destination.join(0.2)
    ended_well = destination.exitcode == 0
    for process in (source, destination):
        process.kill()
        process.join(10)
    print(f"{part}: {'ended' if ended_well else 'FAILED or gave up'}", flush=True)
    return ended_well


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    ended_well = [run_part(part, output) for part in sys.argv[2:] or PARTS]
    sys.exit(not all(ended_well))


if __name__ == "__main__":
    main()
