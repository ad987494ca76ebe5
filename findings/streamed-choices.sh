#!/usr/bin/env bash
# Usage: findings/streamed-choices.sh
#
# Langfuse 5.0.4, langchain-openai 1.7.4 (traced by LangSmith 0.14.17) and mlflow-tracing 3.17.2 record the choices of a
# streamed reply (n=2) as one text, in the order in which the pieces came: "a0 a1 b0 b1 " is said by no choice. The span
# says that two choices were asked for, and holds one. The same call without streaming is recorded as two choices.
# Ends with 0 while this is so, with 1 if it has changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    openai==3.57.0 langfuse==5.0.4 langsmith==0.14.17 langchain-openai==1.7.4 \
    mlflow-tracing==3.17.2 sqlparse==0.6.1 opentelemetry-sdk==1.45.2

cat >"$folder/ask.py" <<'PYTHON'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

library, texts, reasons = sys.argv[1], ("a0 b0 ", "a1 b1 "), ("stop", "length")


class Model(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        head = {"id": "c", "created": 1, "model": "m"}
        if asked.get("stream"):
            deltas = [(n, {"content": piece + " "}, None) for piece_of in range(2)
                      for n in range(2) for piece in [texts[n].split()[piece_of]]]
            deltas += [(n, {}, reasons[n]) for n in range(2)]
            chunks = [{**head, "object": "chat.completion.chunk",
                       "choices": [{"index": n, "delta": delta, "finish_reason": reason}]} for n, delta, reason in deltas]
            kind, body = "text/event-stream", "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
        else:
            choices = [{"index": n, "message": {"role": "assistant", "content": texts[n]}, "finish_reason": reasons[n]}
                       for n in range(2)]
            kind, body = "application/json", json.dumps({**head, "object": "chat.completion", "choices": choices})
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
messages = [{"role": "user", "content": "Say something."}]
if library == "langchain":
    os.environ |= {"LANGSMITH_TRACING": "true", "LANGSMITH_TRACING_MODE": "otel", "LANGSMITH_API_KEY": "none"}
    from langchain_core.messages import HumanMessage
    from langchain_core.tracers.langchain import wait_for_all_tracers
    from langchain_openai import ChatOpenAI
    from langsmith.run_trees import get_cached_client

    model = ChatOpenAI(model="m", base_url=url, api_key="none", n=2)
    model.generate([[HumanMessage("Say something.")]])
    for _ in model.stream([HumanMessage("Say something.")]):
        pass
    wait_for_all_tracers()
    get_cached_client().flush()
    said, asked = "gen_ai.completion", "langsmith.metadata.n"
else:
    if library == "langfuse":
        from langfuse import Langfuse
        from langfuse.openai import OpenAI

        Langfuse(public_key="pk", secret_key="sk", base_url=url, tracer_provider=provider,
                 span_exporter=InMemorySpanExporter())
        said, asked = "langfuse.observation.output", "langfuse.observation.model.parameters"
    else:
        os.environ |= {"MLFLOW_USE_DEFAULT_TRACER_PROVIDER": "false",
                       "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{url}/traces",
                       "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
        import mlflow.openai
        from openai import OpenAI

        mlflow.openai.autolog()
        said, asked = "mlflow.spanOutputs", "mlflow.spanInputs"
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    client.chat.completions.create(model="m", messages=messages, n=2)
    for _ in client.chat.completions.create(model="m", messages=messages, n=2, stream=True):
        pass
spans = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)
recorded = [str(span.attributes[said]) for span in spans]
for how, span, text in zip(("whole", "streamed"), spans, recorded, strict=True):
    print(f"{library}, {how}: asked {str(span.attributes[asked])[-60:]}; recorded {text[:300]}")
whole, streamed = recorded
ok = all(text in whole for text in texts) and "a0 a1 b0 b1 " in streamed and not any(text in streamed for text in texts)
os.write(1, b"" if ok else b"changed; expected both texts whole, and 'a0 a1 b0 b1 ' streamed\n")
sys.stdout.flush()
os._exit(0 if ok else 1)
PYTHON

for library in langfuse langchain mlflow; do
    "$folder/venv/bin/python" -W ignore "$folder/ask.py" "$library" 2>"$folder/errors" || { tail -3 "$folder/errors"; exit 1; }
done
