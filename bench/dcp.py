"""vLLM 0.32.0 leaves attention to the context out of the FULL CUDA graphs of TP+DCP: while they are captured, sequences
have no context (v1/worker/gpu/input_batch.py, `make_dummy`), and then FlashAttention's builder skips it
(v1/attention/backends/flash_attn.py, `skip_dcp_context_attention`), in every later step, too. A step is then faster
than reading its KV cache can be, and its tokens are wrong. Here nothing is skipped, so that this alternative is
measured as it is meant to be.
"""

from __future__ import annotations

from vllm.v1.attention.backends import flash_attn


class ContextWorker:
    """For `worker_extension_cls`: workers import this module by it, before they capture anything."""


flash_attn.should_skip_dcp_context_attention = lambda context_kv_lens_cpu: False
