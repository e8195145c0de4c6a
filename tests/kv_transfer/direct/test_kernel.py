"""The arithmetic of Triton's kernel, on its interpreter: it runs on the host and reads the host's memory."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TILE_BYTES = 1024


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("triton")
    with monkeypatch.context() as interpreted:
        interpreted.setenv("TRITON_INTERPRET", "1")
        module = importlib.reload(importlib.import_module("kv_transfer.direct.kernel"))
        yield module.copy_pages_kernel
    importlib.reload(module)


def words(num_pages: int, page_bytes: int) -> Any:
    return torch.randint(-(2**31), 2**31 - 1, (num_pages, page_bytes // 4), dtype=torch.int32)


@pytest.mark.parametrize("page_bytes", [16, 1008, 1024, 2112, 4096])
@pytest.mark.parametrize("num_programs", [1, 3, 64])
@pytest.mark.parametrize("num_regions", [1, 2])
def test_exactly_the_named_pages_are_copied(kernel: Any, page_bytes: int, num_programs: int, num_regions: int) -> None:
    source, destination = words(20, page_bytes), words(30, page_bytes)
    offsets = torch.tensor([[0, 10], [0, 15]], dtype=torch.int32)[:, :num_regions]
    blocks = torch.stack((torch.randperm(10)[:7], torch.randperm(15)[:7])).int()
    expected, pages = destination.clone(), (offsets[:, :, None] + blocks[:, None]).flatten(1).long()
    expected[pages[1]] = source[pages[0]]
    kernel[(num_programs,)](
        torch.arange(20) * page_bytes + source.data_ptr(),
        torch.arange(30) * page_bytes + destination.data_ptr(),
        torch.cat((offsets, blocks), dim=1).flatten(),
        num_regions,
        7,
        page_bytes // 16,
        -(-page_bytes // TILE_BYTES),
        TILE_WORDS=TILE_BYTES // 4,
    )
    assert torch.equal(destination, expected)


def test_the_bulk_kernel_was_built_from_its_source() -> None:
    import kv_transfer.direct

    folder = Path(kv_transfer.direct.__file__).parent
    built_from = hashlib.sha256((folder / "bulk.cu").read_bytes()).hexdigest()
    assert built_from in (folder / "bulk.ptx").read_text().splitlines()[0], "run scripts/bulk_ptx.py"
