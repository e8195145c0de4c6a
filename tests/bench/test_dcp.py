"""TP+DCP as an alternative: what bench/dcp.py repairs in vLLM is there to be repaired."""

from __future__ import annotations

import importlib

import numpy as np
import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.worker import cp_utils
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers


def test_sequences_have_no_context_while_graphs_are_captured_so_vllm_would_skip_it() -> None:
    buffers = InputBuffers(max_num_reqs=4, max_num_tokens=4, device=torch.device("cpu"))
    batch = InputBatch.make_dummy(4, 4, buffers)
    context = batch.seq_lens_cpu_upper_bound - torch.from_numpy(np.diff(batch.query_start_loc_np))
    assert cp_utils.should_skip_dcp_context_attention(context)

    importlib.import_module("bench.dcp")

    assert not flash_attn.should_skip_dcp_context_attention(context)
