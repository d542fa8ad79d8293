#!/bin/sh
# Generates with curl; prints the reply: curl.sh [URL [MODEL [PROMPT]]]
set -eu
url=${1:-http://localhost:8501}
model=${2:-quickstart}
prompt=${3:-The import statement}

# Base64 avoids JSON escaping. A row has to contain every input, because REST ignores defaults.
curl -sS --fail-with-body --data-binary @- "$url/v1/models/$model:predict" <<EOF
{
  "signature_name": "generate",
  "instances": [
    {
      "prompt": {"b64": "$(printf '%s' "$prompt" | base64 | tr -d '\n')"},
      "max_new_tokens": 20,
      "temperature": 0.8,
      "top_k": 50,
      "top_p": 0.95,
      "repetition_penalty": 1.0,
      "seed": 7,
      "stop": ""
    }
  ]
}
EOF
