#!/bin/sh
# Checks a live endpoint from its status to seeded generation, with curl alone:
#
#   serving/smoke.sh http://localhost:8501 [MODEL]
#
# One line per check. Exit code 0 if all pass, 1 if one fails, 2 for wrong arguments.
set -u
LC_ALL=C
export LC_ALL
line='
'

usage() {
    echo "usage: $0 URL [MODEL], such as http://localhost:8501 quickstart" >&2
    exit 2
}

[ $# -eq 1 ] || [ $# -eq 2 ] || usage
url=${1%/}
model=${2:-quickstart}
case $url in http://?* | https://?*) ;; *) usage ;; esac
case $model in '' | *[!A-Za-z0-9._-]*) usage ;; esac
command -v curl >/dev/null || { echo "$0: curl is not installed" >&2; exit 2; }

# ask PATH [BODY] leaves the reply in $reply and its status in $code; 000 if there was none.
ask() {
    path=$1
    shift
    [ $# -eq 0 ] || set -- --data-binary "$1"
    reply=$(curl -sS --max-time 120 -w '\n%{http_code}' "$@" "$url/v1/models/$model$path" 2>&1)
    code=${reply##*"$line"}
    reply=${reply%"$line"*}
    # Without white space, in which servers differ.
    compact=$(printf '%s' "$reply" | tr -d ' \t\r\n')
}

# The text in the reply to a row, as escaped in the JSON.
text() {
    printf '%s' "$reply" | tr '\n' ' ' |
        sed -n -E 's/.*"(generated_text": *|predictions": *\[ *)"(([^"\\]|\\.)*)".*/\2/p'
}

failed=0
# verdict NAME WHAT SUCCESS prints the line of a check; SUCCESS is its text if the check passes, empty if it fails.
verdict() {
    if [ -n "$3" ]; then
        echo "ok      $1: $3"
    else
        echo "FAILED  $1: $2; HTTP $code: $(printf '%s' "$reply" | tr '\n' ' ' | cut -c 1-300)"
        failed=1
    fi
}

found=
ask ''
case $code$compact in 200*'"state":"AVAILABLE"'*) found="a version of $model is AVAILABLE" ;; esac
verdict status "no version of $model is AVAILABLE" "$found"
# Without a server, the other checks would say the same.
[ "$code" != 000 ] || exit 1

missing=
ask /metadata
for name in serving_default generate score; do
    case $compact in *"\"$name\":{"*) ;; *) missing="$missing $name" ;; esac
done
[ "$code" = 200 ] || missing=" metadata"
found=
[ -n "$missing" ] || found="serving_default, generate and score exist"
verdict metadata "missing:$missing" "$found"

prompt='The import statement'
found=
ask :predict "{\"instances\": [\"$prompt\"]}"
if [ "$code" = 200 ]; then
    case $(text) in "$prompt"*) found="it continues the prompt" ;; esac
fi
verdict serving_default "no text that continues the prompt" "$found"

found=
params='"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop": ""'
body="{\"signature_name\": \"generate\", \"instances\": [{\"prompt\": \"$prompt\", $params, \"seed\": 7}]}"
ask :predict "$body"
if [ "$code" = 200 ]; then
    first=$(text)
    ask :predict "$body"
    [ -z "$first" ] || [ "$code" != 200 ] || [ "$(text)" != "$first" ] || found="the same seed gives the same text"
fi
verdict generate "no text, or another one for the same seed" "$found"

perplexity=
ask :predict '{"signature_name": "score", "instances": ["The import statement is a statement."]}'
if [ "$code" = 200 ]; then
    perplexity=$(printf '%s' "$compact" | sed -n -E 's/.*"perplexity":([0-9][0-9.e+-]*)[,}].*/\1/p')
fi
verdict score "no finite perplexity" "${perplexity:+perplexity $perplexity}"

found=
ask :predict '{"instances": [1]}'
[ "$code" != 400 ] || found="a number as text is refused with 400"
verdict 'bad request' "a number as text should be refused with 400" "$found"

exit $failed
