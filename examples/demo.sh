#!/bin/sh
# The whole path on a real model: get it, convert it, check it, talk to it. `make demo` runs this inside .venv;
# MODEL=path-or-hub-id takes another model than SmolLM2.
set -eu
cd "$(dirname "$0")/.."

heading() { printf '\n== %s\n' "$1"; }
show() { printf '$ %s\n' "$*"; "$@"; }

if [ -z "${MODEL:-}" ]; then
    MODEL=build/SmolLM2-135M-Instruct
    heading "A real model in 16 bit"
    show python examples/smollm2.py "$MODEL"
fi
OUT=build/$(basename "$MODEL")-int8
QUESTION="Explain in two sentences what a neural network is."

heading "Converted to int8, once; the sizes before and after"
rm -rf "$OUT"
show llmint8-convert "$MODEL" "$OUT"

heading "Every tensor checked against the specification and its SHA-256"
show llmint8 verify "$OUT"

heading "Loaded with runtime.load(), and asked: $QUESTION"
printf '$ python examples/generate.py %s "..."\n' "$OUT"
python examples/generate.py "$OUT" "$QUESTION"
