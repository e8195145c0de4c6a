"""Builds kv_transfer/direct/bulk.ptx from bulk.cu: `python scripts/bulk_ptx.py LIBNVRTC`.

LIBNVRTC is NVRTC's library, as pip installs it with `nvidia-cuda-nvrtc-cu12==12.4.127`; that version's PTX runs on
drivers from 550 on. The first line names the source that it was built from.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "kv_transfer/direct/bulk.cu"
OPTIONS = (b"--gpu-architecture=compute_90", b"-std=c++17")


def main() -> None:
    nvrtc, source = ctypes.CDLL(sys.argv[1]), SOURCE.read_bytes()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"bulk.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    what = "ProgramLog" if failed else "PTX"
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    if failed:
        sys.exit(text.value.decode())
    head = f"// Built by scripts/bulk_ptx.py from bulk.cu, sha256 {hashlib.sha256(source).hexdigest()}\n"
    SOURCE.with_suffix(".ptx").write_text(head + text.value.decode())


if __name__ == "__main__":
    main()
