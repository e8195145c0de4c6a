"""What bench/dcp.py repairs in vLLM is there to be repaired, and is reached."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from tests.services.contract import require, source

SKIP = "should_skip_dcp_context_attention"


def test_sequences_have_no_context_while_graphs_are_captured_so_vllm_would_skip_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("InputBatch.make_dummy(" in source(prepare_inputs_to_capture), "what is captured", "bench.dcp")
    build = flash_attn.FlashAttentionMetadataBuilder.build
    require(SKIP in build.__code__.co_names and SKIP in build.__globals__, "who skips the context", "bench.dcp")
    monkeypatch.setattr(flash_attn, SKIP, getattr(flash_attn, SKIP))  # restored in the end
    sys.modules.pop("bench.dcp", None)
    buffers = InputBuffers(max_num_reqs=4, max_num_tokens=4, device=torch.device("cpu"))
    batch = InputBatch.make_dummy(4, 4, buffers)
    context = batch.seq_lens_cpu_upper_bound - torch.from_numpy(np.diff(batch.query_start_loc_np))
    assert build.__globals__[SKIP](context)

    importlib.import_module("bench.dcp")

    assert not build.__globals__[SKIP](context)
