#!/usr/bin/env bash
# Usage: findings/openai-v2-dependencies.sh
#
# opentelemetry-instrumentation-openai-v2 2.4b0 cannot be imported as pip installs it: it allows every
# opentelemetry-util-genai from 0.4b0 on, but imports a module that 1.3b0 does not have; and it imports httpx,
# which it does not ask for and openai 3.57.0 does not bring. Ends with 0 while this is so, with 1 if it has changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

use() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
try() { "$folder/venv/bin/python" -c "from opentelemetry.instrumentation.openai_v2 import OpenAIInstrumentor" 2>&1 | tail -1 || true; }
expect() {
    local said
    said="$(try)"
    echo "$1: ${said:-imports}"
    [ "$said" = "$2" ] || { echo "changed; expected: ${2:-imports}"; exit 1; }
}

use opentelemetry-instrumentation-openai-v2==2.4b0 opentelemetry-util-genai==1.3b0 openai==3.57.0
expect "openai-v2 2.4b0, util-genai 1.3b0" "ModuleNotFoundError: No module named 'httpx'"
use httpx==0.28.1
expect "the same with httpx 0.28.1" "ModuleNotFoundError: No module named 'opentelemetry.util.genai.instruments'"
use opentelemetry-util-genai==1.1b0
expect "the same with util-genai 1.1b0" ""
