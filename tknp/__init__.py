"""Serve large language models on vLLM with prefill and token-parallel decode on separate pools."""

__version__ = "0.1.0"
