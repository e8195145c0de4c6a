"""Makes small models with a real architecture, a real tokenizer and seeded random weights, without any download.

They exist so that the whole system runs on a laptop and in CI. The text they write is nonsense; what counts is that the
same weights give the same tokens however the engine is split up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Enough English to train a byte-level BPE tokenizer on; bytes that it lacks still encode, one token a byte.
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Prefill computes the keys and values of a prompt; decode reads them "
    "again for every token that it writes. When the key value cache is full, requests wait. Token parallel ranks each "
    "hold the cache of their own requests and compute attention for them, while the root rank holds the weights. "
    "Hello, how are you today? What is the capital of France? Write a short story about a robot who learns to paint."
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """What one tiny model looks like, in the terms of a Hugging Face config; `extra` are the architecture's own
    fields."""

    architecture: str
    model_type: str
    num_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    head_size: int = 32
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    # Wide enough that the next token depends on the context: with the usual 0.02 a random Llama repeats itself.
    initializer_range: float = 0.08
    extra: tuple[tuple[str, Any], ...] = ()


SHAPES = {
    # Grouped-query attention in every layer, like most models that people serve.
    "llama": Shape("LlamaForCausalLM", "llama"),
    # Sliding-window and full attention in turn: two KV cache groups, and logit soft-capping.
    "gemma2": Shape(
        "Gemma2ForCausalLM",
        "gemma2",
        tie_word_embeddings=True,
        # Tied embeddings make a model favour the token that it just read, the more so the larger they are.
        initializer_range=0.02,
        extra=(("sliding_window", 64), ("query_pre_attn_scalar", 32), ("hidden_activation", "gelu_pytorch_tanh")),
    ),
    # All query heads share few KV heads, of which tensor parallelism makes copies.
    "multi_query": Shape("LlamaForCausalLM", "llama", num_kv_heads=1),
    "two_kv_heads": Shape("LlamaForCausalLM", "llama", num_kv_heads=2),
    # Mixture of experts: two of four for each token.
    "mixtral": Shape("MixtralForCausalLM", "mixtral", extra=(("num_local_experts", 4), ("num_experts_per_tok", 2))),
}


def make_tiny_model(directory: Path, shape: str | Shape = "llama", seed: int = 0) -> Path:
    """Writes the model called `shape` to `directory` and returns it; a directory that already holds one is kept.

    Raises:
        ValueError: `shape` is not one of `SHAPES`.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"unknown tiny model {shape!r}; choose one of {', '.join(sorted(SHAPES))}")
        shape = SHAPES[shape]
    marker = directory / "model.safetensors"
    if marker.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(directory)
    _write_weights(directory, shape, vocab_size, seed)
    return directory


def _write_tokenizer(directory: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return len(fast)


def _write_weights(directory: Path, shape: Shape, vocab_size: int, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.model_type,
        architectures=[shape.architecture],
        vocab_size=vocab_size,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=shape.initializer_range,
        **dict(shape.extra),
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory, safe_serialization=True)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
