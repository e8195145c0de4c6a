"""KV caches in another process, which shares them, and in this one, which maps them; without anything of vLLM."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cache:
    """A KV cache: `num_layers` regions of `num_blocks` pages.

    Attributes:
        blocks_first: the layers' pages of one block lie together, instead of the blocks' pages of one layer.
    """

    num_layers: int
    num_blocks: int
    page_bytes: int
    blocks_first: bool = False

    def allocate(self, seed: int) -> Any:
        """Random bytes on the GPU, the same for the same seed."""
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        words = self.num_layers * self.num_blocks * self.page_bytes // 4
        return torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda", generator=generator)

    def descriptors(self, base: int) -> Any:
        """As vLLM lists them: page of layer l and block b is number `l * num_blocks + b`."""
        layers, blocks = np.divmod(np.arange(self.num_layers * self.num_blocks), self.num_blocks)
        pages = blocks * self.num_layers + layers if self.blocks_first else layers * self.num_blocks + blocks
        rows = np.zeros((len(pages), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1] = base + pages * self.page_bytes, self.page_bytes
        return rows

    def ids(self, blocks: Any) -> Any:
        """Numbers of the pages of these blocks, of all layers."""
        from kv_transfer.direct.ids import RegionIds

        offsets = np.arange(self.num_layers, dtype=np.int32) * self.num_blocks
        return RegionIds(offsets, blocks.astype(np.int32))

    def pages(self, tensor: Any) -> Any:
        """`[num_layers * num_blocks, words]` in the order of `descriptors`."""
        words = self.page_bytes // 4
        if self.blocks_first:
            return tensor.view(self.num_blocks, self.num_layers, words).transpose(0, 1).reshape(-1, words)
        return tensor.view(-1, words)


def share_caches(device: int, pipe: Any) -> None:
    """Allocates caches on demand and shares them, until told to end."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    import torch

    from kv_transfer.direct.offer import make_offer

    while (order := pipe.recv()) is not None:
        cache, seed = Cache(**order["cache"]), order["seed"]
        tensor = cache.allocate(seed)
        torch.cuda.synchronize()
        offer, kept = make_offer([tensor])
        if offer.refusal:
            raise RuntimeError(offer.refusal)
        pipe.send((offer, tensor.data_ptr(), os.getpid()))
        if pipe.recv() == "compare":
            pipe.send(bool(torch.equal(tensor, cache.allocate(seed))))
        del tensor, kept
        torch.cuda.empty_cache()


class Peer:
    """A cache of the source, mapped here."""

    def __init__(self, pipe: Any, cache: Cache, seed: int) -> None:
        from kv_transfer.direct import driver
        from kv_transfer.direct.pages import Mapping, PageList

        pipe.send({"cache": asdict(cache), "seed": seed})
        self._pipe = pipe
        offer, address, self.process = pipe.recv()
        self.mappings = [Mapping(s.base, s.size, driver.open_segment(s)) for s in offer.segments]
        self.pages = PageList(cache.descriptors(address)).mapped(self.mappings)

    def close(self, answer: str = "done") -> None:
        from kv_transfer.direct import driver

        for mapping in self.mappings:
            driver.close_segment(mapping.address)
        self._pipe.send(answer)

    def is_unchanged(self) -> bool:
        """Closes it, too."""
        self.close("compare")
        return bool(self._pipe.recv())
