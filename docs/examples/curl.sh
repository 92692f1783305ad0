#!/bin/sh
# curl through the local proxy: who answers, then one completion, streamed as it comes.
set -eu
proxy=${VOUCHSAFE_PROXY:-http://127.0.0.1:8080}
question=${1:-What can the host see?}

curl -sS --fail-with-body "$proxy/vouchsafe/status.json" | grep -E '"(target|verdict|operator|development)"'
curl -sS --fail-with-body --no-buffer "$proxy/v1/chat/completions" \
  -H "Authorization: Bearer $VOUCHSAFE_API_KEY" -H "Content-Type: application/json" \
  -d "{\"model\": \"$VOUCHSAFE_MODEL\", \"temperature\": 0, \"stream\": true,
       \"messages\": [{\"role\": \"user\", \"content\": \"$question\"}]}"
