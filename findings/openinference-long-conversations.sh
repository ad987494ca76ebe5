#!/usr/bin/env bash
# Usage: findings/openinference-long-conversations.sh
#
# openinference-instrumentation-openai 0.1.66 writes two attributes for each message of a call, the oldest message
# first. A provider of opentelemetry-sdk 1.45.2 keeps 128 attributes of a span by default and drops the oldest ones, so
# of a call with 140 messages the first 78 are missing, the system message among them; what is left looks like a call
# with 62 messages. The SDK logs a warning for each. Ends with 0 while this is so, with 1 if it has changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    openinference-instrumentation-openai==0.1.66 openai==3.57.0 opentelemetry-sdk==1.45.2

"$folder/venv/bin/python" -W ignore - 2>"$folder/warnings" <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openai import OpenAI
from openinference.instrumentation.openai import OpenAIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Model(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
        body = json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
OpenAIInstrumentor().instrument(tracer_provider=provider)
messages = [{"role": "system", "content": "Be brief."}]
messages += [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(139)]
OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none").chat.completions.create(
    model="m", messages=messages
)
(span,) = exporter.get_finished_spans()
left = sorted({int(name.split(".")[2]) for name in span.attributes if name.startswith("llm.input_messages.")})
print(f"sent {len(messages)} messages; the span has {len(left)}: numbers {left[0]} to {left[-1]}")
print(f"attributes kept {len(span.attributes)}, dropped {span.dropped_attributes}; status {span.status.status_code.name}")
if (left[0], left[-1], len(span.attributes)) != (78, 139, 128):
    print("changed; expected messages 78 to 139 in 128 attributes")
    sys.exit(1)
PYTHON
