#!/usr/bin/env bash
# Usage: findings/gemini-cli-messages.sh
#
# Gemini CLI 0.61.0 records a streamed reply in `gen_ai.output.messages` as one message for each piece of the stream,
# although OpenTelemetry's conventions want one message for each choice: a reader takes a reply of 4 pieces for 4
# replies, or for its first word. Of an input over 10,000 characters it records the beginning, followed by
# "...[TRUNCATED: original length N]", which is no JSON any more. Needs Node.js 20 with npm.
# Ends with 0 while this is so, with 1 if it has changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/packages" "$folder/home/.gemini" "$folder/work"
cd "$folder/packages"
echo '{}' >package.json
npm install --silent --ignore-scripts --no-audit --no-fund @google/gemini-cli@0.61.0
cat >"$folder/home/.gemini/settings.json" <<'JSON'
{"security": {"auth": {"selectedType": "gemini-api-key"}}, "tools": {"core": []},
 "privacy": {"usageStatisticsEnabled": false}}
JSON

cat >"$folder/ask.py" <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder = Path(sys.argv[1])


class Model(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = ""
        for number in range(4):
            candidate = {"index": 0, "content": {"role": "model", "parts": [{"text": f"word{number} "}]}}
            candidate |= {"finishReason": "STOP"} if number == 3 else {}
            usage = {"promptTokenCount": 3, "candidatesTokenCount": number + 1, "totalTokenCount": number + 4}
            body += f"data: {json.dumps({'candidates': [candidate], 'usageMetadata': usage})}\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()


def call(question):
    log = folder / "telemetry.log"
    log.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GEMINI_", "GOOGLE_"))}
    environment |= {"HOME": str(folder / "home"), "GEMINI_API_KEY": "none", "GEMINI_CLI_TRUST_WORKSPACE": "true",
                    "GOOGLE_GEMINI_BASE_URL": f"http://127.0.0.1:{server.server_port}",
                    "GEMINI_TELEMETRY_ENABLED": "true", "GEMINI_TELEMETRY_TRACES_ENABLED": "true",
                    "GEMINI_TELEMETRY_OUTFILE": str(log)}
    program = folder / "packages/node_modules/@google/gemini-cli/bundle/gemini.js"
    subprocess.run(["node", str(program), "--model", "m", "--prompt", question], cwd=folder / "work", env=environment,
                   check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    text, place, decoder = log.read_text(encoding="utf-8"), 0, json.JSONDecoder()
    while (place := text.find("{", place)) >= 0:
        each, place = decoder.raw_decode(text, place)
        if each.get("name") == "llm_call":
            return each["attributes"]
    sys.exit("changed; expected a span llm_call")


output = call("Say something.")["gen_ai.output.messages"]
print(f"output: {output}")
whole = call("Why? " * 3000)["gen_ai.input.messages"]
print(f"input of a long question: …{whole[-60:]}")
roles = [message["role"] for message in json.loads(output)]
if roles != ["model"] * 4 or "...[TRUNCATED: original length " not in whole:
    sys.exit("changed; expected 4 messages, and an input that is not whole")
PYTHON
python3 "$folder/ask.py" "$folder"
