"""What the continuation of streams takes for granted of vLLM."""

from __future__ import annotations

import random
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer, decoders, models

from router.continued import Before, Continued, StopText
from router.relay import EMPTY
from router.types import Api
from router.validation import parse_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponseStreamChoice,
        ChatCompletionStreamResponse,
    )
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice, CompletionStreamResponse
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, DetokenizeResponse
    from vllm.logprobs import Logprob
    from vllm.model_executor.layers.utils import apply_penalties
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer


def chat_event(delta: DeltaMessage, finish: str | None = None) -> bytes:
    choice = ChatCompletionResponseStreamChoice(index=0, delta=delta, logprobs=None, finish_reason=finish)
    chunk = ChatCompletionStreamResponse(
        id="a", object="chat.completion.chunk", created=1, choices=[choice], model="m", prompt_token_ids=None
    )
    return str(chunk.model_dump_json(exclude_unset=True)).encode()


def completion_event(text: str, finish: str | None = None) -> bytes:
    choice = CompletionResponseStreamChoice(index=0, text=text, logprobs=None, finish_reason=finish, stop_reason=None)
    chunk = CompletionStreamResponse(id="a", object="text_completion", created=1, model="m", choices=[choice])
    return str(chunk.model_dump_json(exclude_unset=True)).encode()


def test_events_without_anything_of_the_answer_are_known() -> None:
    empty = [chat_event(DeltaMessage(role="assistant", content="")), chat_event(DeltaMessage(content=""))]
    empty += [chat_event(DeltaMessage()), completion_event("")]
    assert all(EMPTY.search(event) for event in empty)
    told = [chat_event(DeltaMessage(content="a")), chat_event(DeltaMessage(reasoning="a")), completion_event("a")]
    told += [completion_event("", "stop"), chat_event(DeltaMessage(content=""), "stop")]
    assert not any(EMPTY.search(event) for event in told)


@pytest.mark.parametrize("event", [chat_event(DeltaMessage(content="a")), completion_event("a")])
def test_what_all_events_share_comes_before_their_choices(event: bytes) -> None:
    assert list(orjson.loads(event.partition(b',"choices":')[0] + b"}"))[:2] == ["id", "object"]
    assert b'"model":' in event.partition(b',"choices":')[0]


def test_a_detokenizer_must_not_begin_within_a_character() -> None:
    """Why such tokens are generated again. Once it may, `_whole_characters` is not needed."""
    vocabulary = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "p": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = decoders.DecodeStream(ids=[256, *"€".encode()[:2]], skip_special_tokens=True)
    assert stream.step(tokenizer, "€".encode()[2]) == "p€"


def test_engines_decode_tokens() -> None:
    assert DetokenizeRequest.model_validate({"model": "m", "tokens": [1]}).tokens == [1]
    assert DetokenizeResponse(prompt="a").model_dump() == {"prompt": "a"}


def test_repetition_asks_whether_a_token_was_there_and_presence_whether_it_was_in_the_answer() -> None:
    def penalized(prompt: list[int], output: list[int], presence: float, repetition: float) -> torch.Tensor:
        logits = torch.arange(1.0, 7.0).reshape(1, 6)
        tokens = (torch.tensor([prompt]), torch.tensor([output]))
        rates = [torch.tensor([rate]) for rate in (presence, 0.0, repetition)]
        return apply_penalties(logits, *tokens, *rates)

    assert torch.equal(penalized([1], [2, 2, 3], 0.0, 1.5), penalized([1, 2, 2], [3], 0.0, 1.5))
    assert not torch.equal(penalized([1], [2, 2, 3], 0.5, 1.0), penalized([1, 2, 2], [3], 0.5, 1.0))


@pytest.mark.parametrize("num_top", [None, 0, 1, 2])
def test_logprobs_of_the_completions_api_have_all_that_chat_s_have(num_top: int | None) -> None:
    """vLLM has the sampled token first, then the most likely ones; the same may be among these."""
    tops = [
        {1: Logprob(-0.5, 1, "a"), 2: Logprob(-1.5, 2, "é")},
        {3: Logprob(-4.0, 9, "\ufffd"), 2: Logprob(-0.5, 1, "é")},
    ]
    chat: Any = SimpleNamespace(return_tokens_as_token_ids=False)
    chat._get_decoded_token = OpenAIServingChat._get_decoded_token
    chat._get_top_logprobs = partial(OpenAIServingChat._get_top_logprobs, chat)
    wanted = OpenAIServingChat._create_chat_logprobs(chat, [1, 3], tops, None, num_top).model_dump()["content"]
    completion = OpenAIServingCompletion._create_completion_logprobs(chat, [1, 3], tops, num_top or 0, None)
    choice = {"index": 0, "text": "x", "logprobs": completion.model_dump(), "finish_reason": None, "token_ids": [1, 3]}
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": num_top, "stream": True}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    request = parse_request(Api.CHAT, orjson.dumps(body), "r")
    continued = Continued(request, Before({}, 0, [], 0, None), None)
    dressed, _ = continued.dress(b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n")
    assert orjson.loads(dressed[6:])["choices"][0]["logprobs"]["content"] == wanted


class Letters(BaseIncrementalDetokenizer):  # type: ignore[misc]
    def decode_next(self, next_token_id: int) -> str:
        return chr(next_token_id)


def told(tokens: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    """vLLM's chunks for a token a letter until a stop string ends them."""
    request = SimpleNamespace(sampling_params=SamplingParams(max_tokens=99, **params))
    detokenizer = Letters(request)
    chunks: list[dict[str, Any]] = []
    for i, letter in enumerate(tokens):
        stop = detokenizer.update([ord(letter)], False)
        finish = "stop" if stop else "length" if i == len(tokens) - 1 else None
        text = detokenizer.get_next_output_text(finish is not None, delta=True)
        chunks.append({"text": text, "finish_reason": finish, "stop_reason": stop, "token_ids": [ord(letter)]})
        if finish:
            break
    return chunks


@pytest.mark.parametrize("is_included", [False, True])
def test_stop_strings_over_a_break_are_those_of_vllm_s_detokenizer(is_included: bool) -> None:
    rng, num_ended_over = random.Random(1), 0
    for _ in range(1500):
        answer = "".join(rng.choices("ab", k=rng.randint(4, 16)))
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(rng.randint(1, 3))]
        min_tokens = rng.choice((0, 0, rng.randint(1, 10)))
        params: dict[str, Any] = {"stop": stops, "include_stop_str_in_output": is_included}
        whole = told(answer, {**params, "min_tokens": min_tokens})
        num_before = rng.randrange(1, len(answer))
        sent = "".join(chunk["text"] for chunk in whole[:num_before])
        if num_before >= len(whole) or not sent:
            continue
        left = max(0, min_tokens - num_before)
        held = answer[:num_before][-(max(map(len, stops)) - 1) :]
        text = StopText(stops, is_included, left, held)
        rest = told(
            answer[num_before:], {"stop": stops, "include_stop_str_in_output": True, "min_tokens": min(left, 98)}
        )
        for chunk in rest:
            sent += text.take(chunk, chunk["text"])
            if chunk["finish_reason"]:
                break
        num_ended_over += chunk is not rest[-1]
        assert sent == "".join(chunk["text"] for chunk in whole), (answer, stops, num_before, min_tokens)
        assert (chunk["finish_reason"], chunk["stop_reason"]) == (whole[-1]["finish_reason"], whole[-1]["stop_reason"])
    assert num_ended_over > 20, "stop strings should have begun before the break and ended after it"
