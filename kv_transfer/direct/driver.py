"""GPU memory of one process in another: the few calls of CUDA's driver that it takes.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html. The driver is called directly because torch keeps
its own sharing of tensors to itself, and counts references of which the two engines here know nothing: a lease guards
the blocks, and the cache lives as long as its engine.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_LAZY_ENABLE_PEER_ACCESS = 1
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...


class DriverError(RuntimeError):
    """CUDA's driver refused a call."""


@dataclass(frozen=True)
class Segment:
    """One allocation of the process that offers it; several tensors may lie in it.

    Attributes:
        base: its address there.
        size: bytes.
        handle: CUDA's name for it, valid in other processes of this host.
    """

    base: int
    size: int
    handle: bytes


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, size = ctypes.c_uint64, ctypes.c_size_t
    library.cuMemGetAddressRange_v2.argtypes = [ctypes.POINTER(pointer), ctypes.POINTER(size), pointer]
    library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), pointer]
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(pointer), _Handle, ctypes.c_uint]
    library.cuIpcCloseMemHandle.argtypes = [pointer]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(text))
        raise DriverError(f"{name}: {text.value.decode() if text.value else status}")


class Kernel:
    """A kernel on the current device, from PTX."""

    def __init__(self, ptx: bytes, name: str, shared_bytes: int) -> None:
        """Args:
        shared_bytes: dynamic shared memory of each block.

        Raises:
            DriverError: this GPU or its driver can't run it.
        """
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._shared_bytes = shared_bytes
        _call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(ptx))
        _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, ctypes.c_char_p(name.encode()))
        _call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)

    def launch(self, num_blocks: int, num_threads: int, stream: int, arguments: list[Any]) -> None:
        """Puts it on a stream.

        Args:
            arguments: ctypes' values, in the order and of the size of the kernel's parameters.

        Raises:
            DriverError: it could not be started, or something before it failed.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        grid, block = (num_blocks, 1, 1), (num_threads, 1, 1)
        _call(
            "cuLaunchKernel",
            self._function,
            *grid,
            *block,
            self._shared_bytes,
            ctypes.c_void_p(stream),
            addresses,
            None,
        )


@contextmanager
def context(device: Any) -> Iterator[None]:
    """Makes the device's CUDA context this thread's, which all calls below need."""
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).query()  # the first call to the runtime is what makes it
        yield


def gpu_uuid(device: Any) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def export(address: int) -> Segment:
    """The allocation that this device address lies in.

    Raises:
        DriverError: it can't be shared; so it is with memory of expandable segments and of vLLM's sleep mode.
    """
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return Segment(base.value, size.value, bytes(handle.reserved))


def open_segment(segment: Segment) -> int:
    """Maps another process's allocation; its address here. The other GPU need not be visible to this process."""
    address = ctypes.c_uint64()
    handle = _Handle((ctypes.c_ubyte * 64)(*segment.handle))
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, _LAZY_ENABLE_PEER_ACCESS)
    return address.value


def close_segment(address: int) -> None:
    """Unmaps what `open_segment` mapped. Nothing may be reading it."""
    _call("cuIpcCloseMemHandle", address)
