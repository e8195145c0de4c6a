"""Small models of the kinds that are compared on GPUs. Heads are as wide as FlashAttention 3 wants them at least."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tknp.tiny_model import SHAPES, Shape, make_tiny_model

GROUP_SIZE = 128
"""Weights that share a scale in `llama-w4a16`."""


def _wide(name: str) -> Shape:
    shape = replace(SHAPES[name], hidden_size=512, intermediate_size=1024, head_size=64)
    return replace(shape, initializer_range=shape.initializer_range * 3 / 4)  # as if the logits came of a narrow one


_SHAPES = {name: _wide(name) for name in ("llama", "gemma2", "mixtral", "multi_query", "two_kv_heads")}


def make_model(directory: Path, name: str) -> Path:
    """One of `_SHAPES`, or `llama-w4a16`: four bits a weight, in compressed-tensors' packed format."""
    path = directory / name
    if name != "llama-w4a16":
        return make_tiny_model(path, _SHAPES[name])
    if not (path / "model.safetensors").exists():
        make_tiny_model(path, _SHAPES["llama"])
        _quantise(path)
    return path


def _quantise(path: Path) -> None:
    """Rounds every linear layer but the head to integers of -8 to 7, symmetrically, in groups of the input."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    weights = load_file(file)
    packed = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight.bfloat16()
            continue
        groups = weight.view(weight.shape[0], -1, GROUP_SIZE)
        scale = groups.abs().amax(dim=2, keepdim=True) / 7
        integers = (groups / scale).round().clamp(-8, 7).to(torch.int8).view_as(weight)
        packed[f"{name}_packed"] = pack_to_int32(integers, 4).contiguous()
        packed[f"{name}_scale"] = scale.squeeze(2).bfloat16().contiguous()
        packed[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(packed, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    given = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": given, "input_activations": None}},
    }
    (path / "config.json").write_text(json.dumps(config))
