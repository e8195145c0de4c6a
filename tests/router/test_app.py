from __future__ import annotations

import pytest
from openai import APIError, NotFoundError, OpenAI

from router.records import RecordStore
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import KV_PARAMS, MODEL, NUM_CHUNKS, chunk, raw_stream, status


def test_a_completion_takes_both_legs_with_one_id(stack: Stack) -> None:
    answer = stack.router.complete(max_tokens=7, temperature=0, logprobs=2, headers={"X-Request-Id": "abc"})
    assert answer.status == 200, answer.body
    assert answer.headers["x-request-id"] == "abc"
    (prefill,), (decode,) = stack.prefill[0].seen, stack.decode[0].seen
    assert prefill.headers["x-request-id"] == decode.headers["x-request-id"] == "abc"
    assert prefill.body["max_tokens"] == 1
    assert prefill.body["stream"] is False
    assert prefill.body["n"] == 1
    assert "logprobs" not in prefill.body
    assert prefill.body["kv_transfer_params"]["do_remote_decode"] is True
    params = decode.body.pop("kv_transfer_params")
    assert params == {**KV_PARAMS, "tknp_request_id": "abc", "tknp_num_readers": 1}
    assert decode.body == {"model": MODEL, "prompt": "hi", "max_tokens": 7, "temperature": 0, "logprobs": 2}


def test_a_stream_is_relayed_byte_for_byte(stack: Stack) -> None:
    answer = stack.router.complete(stream=True, n=2)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body == b"".join(chunk(i) for i in range(NUM_CHUNKS)) + b"data: [DONE]\n\n"
    assert stack.decode[0].seen[0].body["kv_transfer_params"]["tknp_num_readers"] == 2


def test_unknown_fields_pass_through_untouched(stack: Stack) -> None:
    fields = {"tools": [{"type": "function", "function": {"name": "f"}}], "x_unknown": {"é": [1, 2.5, None]}}
    assert stack.router.chat(max_completion_tokens=9, response_format={"type": "json_object"}, **fields).status == 200
    decode = stack.decode[0].seen[0].body
    assert decode["tools"] == fields["tools"]
    assert decode["x_unknown"] == fields["x_unknown"]
    assert decode["max_completion_tokens"] == 9
    assert "max_tokens" not in decode
    assert stack.prefill[0].seen[0].body["max_completion_tokens"] == 1


def test_the_official_client_works(stack: Stack) -> None:
    with OpenAI(base_url=f"{stack.router.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        whole = client.completions.create(model=MODEL, prompt="hi", max_tokens=5)
        assert whole.choices[0].text == "0 1 2 3 4 "
        with client.completions.create(model=MODEL, prompt="hi", stream=True) as stream:
            assert [event.choices[0].text for event in stream] == [f"{i} " for i in range(NUM_CHUNKS)]


def test_the_official_client_reads_our_errors(stack: Stack) -> None:
    stack.decode[0].behaviour = raw_stream(chunk(0), then="close")
    with OpenAI(base_url=f"{stack.router.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(NotFoundError, match="is not served here"):
            client.completions.create(model="none", prompt="hi")
        stream = client.completions.create(model=MODEL, prompt="hi", stream=True)
        with stream, pytest.raises(APIError, match="failed"):
            for event in stream:
                assert event.choices[0].text == "0 "


def test_ids_of_clients_are_checked(stack: Stack) -> None:
    for wanted in ("x" * 129, "two words", "caf\u00e9"):
        given = stack.router.complete(headers={"X-Request-Id": wanted}).headers["x-request-id"]
        assert given != wanted
        assert given.startswith("req-")
    assert stack.router.call("GET", "/health", headers={"X-Request-Id": "h1"}).headers["x-request-id"] == "h1"


def test_unknown_paths_and_methods_answer_with_openais_error(stack: Stack) -> None:
    answer = stack.router.call("GET", "/nowhere")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    answer = stack.router.call("GET", "/v1/completions")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = stack.router.call("POST", "/v1/completions/", {})
    assert answer.status == 404
    assert stack.router.call("GET", "/requests/none").error["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/v1/completions", 405),
        ("HEAD", "/nowhere", 404),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("TRACE", "/health", 405),
        ("PUT", "/v1/responses/resp_1", 405),
        ("GET", "/v1/models/%ff%fe", 404),
        ("GET", "/v1/models/%zz", 404),
        ("GET", "/requests/%00%0d%0a", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/responses/", 404),
        ("POST", "/v1/responses/a%2Fb/cancel", 404),
    ],
)
def test_odd_requests_get_openais_error(stack: Stack, method: str, path: str, status: int) -> None:
    answer = stack.router.call(method, path)
    assert answer.status == status
    assert "allow" in answer.headers or status != 405
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    if method == "HEAD":
        assert answer.body == b""
    else:
        assert answer.error["type"] == "invalid_request_error"


def test_ready_says_engine_by_engine_what_is_missing(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=1, num_decode=2, decode_only=False)
    answer = stack.router.call("GET", "/ready")
    assert (answer.status, answer.json()["ready"], answer.json()["missing"]) == (200, True, [])
    stack.prefill[0].kill()
    wait_for(lambda: stack.router.call("GET", "/ready").status == 503)
    told = stack.router.call("GET", "/ready").json()
    assert told["missing"] == ["no prefill engine is up"]
    assert [engine["up"] for engine in told["engines"]] == [False, True, True]
    assert told["engines"][0]["url"] == stack.prefill[0].url
    assert told["engines"][0]["reason"]
    stack.prefill[0].revive()
    wait_for(lambda: stack.router.call("GET", "/ready").status == 200)


def test_not_ready_when_no_model_is_served_by_both(start_stack: StartStack) -> None:
    stack = start_stack(models_interval=0.1, decode_only=False)
    stack.prefill[0].models = [{"id": "other"}]
    wait_for(lambda: stack.router.call("GET", "/ready").status == 503)
    assert "both" in stack.router.call("GET", "/ready").json()["missing"][0]


def test_health_needs_no_engine(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=0, num_decode=0)
    assert stack.router.call("GET", "/health").json() == {"status": "ok"}
    assert stack.router.call("GET", "/ready").json()["missing"] == ["no decode engine is up"]
    assert stack.router.call("GET", "/v1/models").json() == {"object": "list", "data": []}


def test_every_kind_of_error_bears_the_id(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: RecordStore, request_id: str) -> None:
        raise RuntimeError("scripted")

    router, headers = stack.router, {"X-Request-Id": "mine"}
    stack.decode[0].behaviour = status(400)
    answers = [
        router.complete(headers),
        router.complete(headers, max_tokens=-1),
        router.call("GET", "/no", None, headers),
    ]
    monkeypatch.setattr(RecordStore, "get", fail)
    answers.append(router.call("GET", "/requests/x", None, headers))
    assert [answer.status for answer in answers] == [400, 400, 404, 500]
    assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}
