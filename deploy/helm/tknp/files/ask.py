"""Asks a router whether it is ready, then each model that it serves for a few tokens. Standard library alone."""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from typing import Any

URL, KEY = os.environ["URL"], os.environ.get("API_KEY", "")
DEADLINE = time.monotonic() + float(os.environ["TIMEOUT_SECONDS"])
# The certificate may be for the public name alone; what is tested is that an answer comes.
UNVERIFIED = ssl._create_unverified_context()


def ask(path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {KEY}"} if KEY else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, headers)
    left = max(1.0, DEADLINE - time.monotonic())
    with urllib.request.urlopen(request, timeout=left, context=UNVERIFIED) as answer:
        return json.load(answer)


def reason(error: OSError) -> str:
    return error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)


while True:
    try:
        ask("/ready")
        break
    except OSError as error:
        why = reason(error)
        if time.monotonic() > DEADLINE:
            sys.exit(f"The router at {URL} is not ready: {why}")
        time.sleep(2)
print("The router is ready.")
if os.environ.get("NEEDS_KEY") and not KEY:
    print("It asks for an API key; with helmTest.apiKey the test would ask for tokens too.")
    sys.exit()
try:
    for model in [model["id"] for model in ask("/v1/models")["data"]]:
        answer = ask("/v1/completions", {"model": model, "prompt": "The capital of France is", "max_tokens": 8})
        if not answer.get("choices"):
            sys.exit(f"The model {model} gave no answer: {answer}")
        print(f"{model}: {answer['choices'][0]['text']!r}")
except OSError as error:
    sys.exit(f"The router at {URL} did not answer: {reason(error)}")
