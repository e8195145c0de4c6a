"""What FP8 on the wire does to what a model says.

    python -m bench.compression [--steps 300] [--prompts 32] [--output bench/results/compression.json]

No weights are downloaded: a small Llama (tknp.tiny_model) is trained first, for minutes, on the texts of Python's own
help, so that its predictions are sharper than random weights'. Then prompts that it has not seen are prefilled, their
KV cache crosses as it does between engines (bfloat16, a scale for each block of 16 tokens, head, keys and values), and
the model goes on from it: only the prompt's KV is compressed, for decode engines compute the rest themselves. Compared
is going on from the same KV in bfloat16.

A second model is the same function with outliers among its keys, as large models have: two channels of each head are
multiplied by 32 and the queries' divided by it.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import re
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kv_transfer.packed.fp8 import HeadShape, round_trip
from tknp.tiny_model import make_tiny_model

BLOCK = 16
PROMPT, ANSWER = 384, 192
AT_ONCE = 16
OUTLIER = 32.0


def tokens_of(directory: Path) -> tuple[Any, Any]:
    """For training and, from other texts, for prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    parts = texts[: -len(texts) // 5], texts[-len(texts) // 5 :]
    joined = (re.sub(r"\s+", " ", "\n".join(part)) for part in parts)
    seen, unseen = (torch.tensor(tokenizer.encode(text)) for text in joined)
    return seen, unseen


def windows(tokens: Any, length: int, count: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(0, len(tokens) - length, (count,), generator=generator)
    return torch.stack([tokens[begin : begin + length] for begin in begins.tolist()])


def train(model: Any, tokens: Any, steps: int) -> float:
    """The last loss, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    recent = math.nan
    for step in range(steps):
        # Now and then as long as what is asked of it later.
        length, count = (PROMPT + ANSWER, 2) if step % 4 == 0 else (128, 8)
        batch = windows(tokens, length, count, step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        now = loss.item()
        recent = now if math.isnan(recent) else 0.95 * recent + 0.05 * now
        if step % 50 == 0:
            print(f"step {step}: {recent:.3f} nats a token", flush=True)
    model.eval()
    return recent


def add_outliers(model: Any) -> None:
    """Scales a pair of channels that RoPE turns together, of each KV head; attention stays the same."""
    config = model.config
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            keys = layer.self_attn.k_proj.weight.view(config.num_key_value_heads, size, -1)
            queries = layer.self_attn.q_proj.weight.view(config.num_key_value_heads, group, size, -1)
            for channel in (size // 2 - 1, size - 1):
                keys[:, channel] *= OUTLIER
                queries[:, :, channel] /= OUTLIER


def prefill(model: Any, prompts: Any, is_compressed: bool) -> tuple[Any, list[float]]:
    """KV of all but the prompts' last token as a decode engine gets it, and the relative error of each head."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(input_ids=prompts[:, :-1], past_key_values=cache)
    errors: list[float] = []
    for layer in cache.layers:
        sent = torch.cat((layer.keys, layer.values), dim=-1).to(torch.bfloat16)
        arrived = cross(sent) if is_compressed else sent
        size = layer.keys.shape[-1]
        for before, after in zip(sent.float().split(size, -1), arrived.float().split(size, -1), strict=True):
            per_head = ((after - before).square().sum((0, 2, 3)) / before.square().sum((0, 2, 3))).sqrt()
            errors += per_head.tolist()
        layer.keys, layer.values = (part.float().contiguous() for part in arrived.split(size, -1))
    return cache, errors


def cross(sent: Any) -> Any:
    """`[requests, heads, tokens, 2 * head size]` through FP8, in blocks; behind the last token stand zeros."""
    requests, heads, tokens, elements = sent.shape
    padded = torch.nn.functional.pad(sent, (0, 0, 0, -tokens % BLOCK))
    blocks = (
        padded.view(requests, heads, -1, BLOCK, elements)
        .transpose(1, 2)
        .reshape(-1, heads, BLOCK, elements)
        .contiguous()
    )
    arrived = round_trip(blocks, HeadShape.of([blocks], values_follow=False))
    whole = arrived.view(requests, -1, heads, BLOCK, elements).transpose(1, 2).reshape(padded.shape)
    return whole[:, :, :tokens]


def answer(model: Any, cache: Any, last: Any) -> Any:
    """Greedy, `[requests, ANSWER]`."""
    found = [last]
    for _ in range(ANSWER):
        found.append(model(input_ids=found[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(found[1:], dim=1)


def log_probabilities(model: Any, prompts: Any, following: Any, is_compressed: bool) -> Any:
    """Of every next token while `following` is read: `[requests, ANSWER, vocabulary]`."""
    cache, _ = prefill(model, prompts, is_compressed)
    read = torch.cat((prompts[:, -1:], following[:, :-1]), dim=1)
    return model(input_ids=read, past_key_values=cache).logits.float().log_softmax(-1)


def batches(unseen: Any, count: int) -> Iterator[tuple[Any, Any]]:
    both = windows(unseen, PROMPT + ANSWER, count, 10**6)
    for part in both.split(AT_ONCE):
        yield part[:, :PROMPT], part[:, PROMPT:]


@torch.no_grad()  # type: ignore[untyped-decorator]
def measure(model: Any, unseen: Any, count: int) -> dict[str, float]:
    """See `main` for the names."""
    sums: dict[str, list[float]] = {}

    def keep(**values: Any) -> None:
        for name, value in values.items():
            sums.setdefault(name, []).append(float(value))

    for prompts, text in batches(unseen, count):
        plain, packed = (answer(model, prefill(model, prompts, c)[0], prompts[:, -1:]) for c in (False, True))
        same = plain == packed
        keep(
            greedy_tokens_equal=same.float().mean(),
            greedy_tokens_until_first_other=same.float().cumprod(1).sum(1).mean(),
            greedy_answers_equal=same.all(1).float().mean(),
        )
        before, after = (log_probabilities(model, prompts, plain, c) for c in (False, True))
        said = plain[..., None]
        keep(
            next_token_equal=(before.argmax(-1) == after.argmax(-1)).float().mean(),
            log_probability_difference=(after - before).gather(-1, said).abs().mean(),
            probability_of_greedy_token=before.gather(-1, said).exp().mean(),
            divergence_nats=(before.exp() * (before - after)).sum(-1).mean(),
        )
        read = [log_probabilities(model, prompts, text, c).gather(-1, text[..., None]) for c in (False, True)]
        keep(text_nats=-read[0].mean(), text_nats_compressed=-read[1].mean())
        alone = model(input_ids=torch.cat((prompts[:, -1:], text[:, :-1]), dim=1)).logits.log_softmax(-1)
        keep(text_nats_without_prompt=-alone.gather(-1, text[..., None]).mean())
        errors = prefill(model, prompts, True)[1]
        keep(relative_error_median_head=torch.tensor(errors).median(), relative_error_worst_head=max(errors))
    row = {name: sum(values) / len(values) for name, values in sums.items()}
    row["text_nats_change"] = row["text_nats_compressed"] / row["text_nats"] - 1
    return row


def main() -> None:
    """Writes, for each model: shares of greedy tokens and whole answers that are equal; tokens before the first that is
    not; with the same tokens before it, the share of next tokens that are equal, the mean absolute difference of the
    greedy token's log probability, and the divergence of the distributions; nats a token of unseen text, also
    without its prompt, which says how much the prompt's KV matters to this model; and the KV's relative error
    (root mean square), of the median and of the worst head, keys and values apart."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    begin = time.monotonic()
    with TemporaryDirectory() as directory:
        made = make_tiny_model(Path(directory) / "model")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        seen, unseen = (tokens.to(device) for tokens in tokens_of(made))
        model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).to(device)
    model.apply(_begin_anew)
    loss = train(model, seen, options.steps)
    print(f"trained in {time.monotonic() - begin:.0f} s", flush=True)
    rows = {"trained": measure(model, unseen, options.prompts)}
    add_outliers(model)
    rows["trained, with outliers"] = measure(model, unseen, options.prompts)
    record = {
        "steps": options.steps,
        "training_nats": loss,
        "prompts": options.prompts,
        "prompt_tokens": PROMPT,
        "answer_tokens": ANSWER,
        "rows": rows,
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


def _begin_anew(module: Any) -> None:
    """Weights to train from; tiny_model's are as wide as random text needs."""
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)


if __name__ == "__main__":
    main()
