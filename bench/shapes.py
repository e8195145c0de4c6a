"""Models by their shape alone: speed depends on sizes, not on what the weights are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class Shape:
    """Counts of a dense Llama-like model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    vocab_size: int = 128_256

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * _BYTES

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights: all but the embedding table, of which it reads some rows."""
        attention = self.hidden_size * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return (self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size) * _BYTES

    def write_config(self, directory: Path) -> Path:
        """A model directory without weights, for `load_format=dummy`."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "tie_word_embeddings": False,
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return directory


SHAPES = {
    "tiny": Shape(2, 256, 512, 8, 4, head_size=32, vocab_size=512),
    "8b": Shape(32, 4096, 14336, 32, 8),
    "8b-2kv": Shape(32, 4096, 14336, 32, 2),
    "32b-2kv": Shape(61, 6144, 23040, 48, 2),  # GLM-4-32B's
    # Half of each of its layers: two GPUs have as much to do with it as four of theirs with the whole.
    "16b-1kv": Shape(61, 6144, 11520, 24, 1, vocab_size=64_128),
}
