#!/usr/bin/env bash
# Asks a router with curl: examples/ask.sh [URL of the router] [its key]
set -euo pipefail

url=${1:-http://127.0.0.1:8000}
key=${2:-none}
json='Content-Type: application/json'
ask() { curl --fail-with-body --silent --show-error --no-buffer -H "Authorization: Bearer ${key}" "$@"; }

echo "Which models, and is everything up?"
ask "$url/v1/models"
echo
ask "$url/ready"
echo

model=$(ask "$url/v1/models" | sed -E 's/"id": ?"([^"]+)".*/\n\1/; s/.*\n//')  # the first one

echo "A whole answer"
ask "$url/v1/chat/completions" -H "$json" -H 'X-Request-Id: an-example' \
    -d '{"model": "'"$model"'", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}'
echo

echo "The way that it took: engines, rank, time in each phase"
ask "$url/requests/an-example"
echo

echo "A stream"
ask "$url/v1/completions" -H "$json" -d '{"model": "'"$model"'", "prompt": "Once", "max_tokens": 8, "stream": true}'

echo "Load, KV cache of each rank, times"
ask "$url/status"
echo
