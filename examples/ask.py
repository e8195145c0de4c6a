"""Asks a router with OpenAI's own client: python examples/ask.py [URL of the router] [its key]"""

from __future__ import annotations

import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

with OpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
    model = client.models.list().data[0].id

    whole = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=16
    )
    print("whole:", whole.choices[0].message.content)

    print("streamed: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count to five."}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out")

    # A tool that must be called. Engines need vLLM's --enable-auto-tool-choice, and the --tool-call-parser that fits
    # the model.
    called = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Is it raining in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=64,
    )
    for call in called.choices[0].message.tool_calls or ():
        if call.type == "function":
            print("tool:", call.function.name, call.function.arguments)
