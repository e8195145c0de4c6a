"""vLLM 0.32.0's Model Runner V2 leaves attention to the context out of the FULL CUDA graphs of TP+DCP: while they are
captured, sequences have no context (v1/worker/gpu/input_batch.py, `make_dummy`), and then FlashAttention's builder
skips it (v1/attention/backends/flash_attn.py, `skip_dcp_context_attention`). A step that replays such a graph takes
less time than reading its KV cache can. Here nothing is skipped, so that this alternative is measured as it is meant
to be.
"""

from __future__ import annotations

from vllm.v1.attention.backends import flash_attn


class ContextWorker:
    """For `worker_extension_cls`, by which workers import this module before they capture anything."""


flash_attn.should_skip_dcp_context_attention = lambda context_kv_lens_cpu: False
