// The agent of instrumented_calls.py with the AI SDK: instrumented_ai_sdk.mjs PACKAGES URL INTEGRATION prints its spans.
//
// PACKAGES is the folder that has node_modules; INTEGRATION is OpenTelemetry or LegacyOpenTelemetry of @ai-sdk/otel.

import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [packages, url, integration] = process.argv.slice(2);
const find = createRequire(`${packages}/`);
const load = (name) => import(pathToFileURL(find.resolve(name)));
const { generateText, isStepCount, streamText, tool, registerTelemetry } = await load('ai');
const otel = await load('@ai-sdk/otel');
const { createOpenAICompatible } = await load('@ai-sdk/openai-compatible');
const { NodeTracerProvider } = await load('@opentelemetry/sdk-trace-node');
const { InMemorySpanExporter, SimpleSpanProcessor } = await load('@opentelemetry/sdk-trace-base');
const { z } = await load('zod');

const exporter = new InMemorySpanExporter();
new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }).register();
registerTelemetry(new otel[integration]());
const model = createOpenAICompatible({ name: 'local', baseURL: url, apiKey: 'none', includeUsage: true })('policy');
const weather = tool({
  description: 'Tells the weather.',
  inputSchema: z.object({ city: z.string() }),
  execute: async () => 'rain',
});
const instructions = 'Be brief.';
await generateText({ model, instructions, prompt: 'Weather in Paris?', tools: { weather }, stopWhen: isStepCount(3) });
const stream = streamText({ model, instructions, prompt: 'And tomorrow?' });
for await (const _ of stream.textStream);

const seconds = ([whole, nanos]) => whole + nanos / 1e9;
const status = (code) => ({ status_code: ['UNSET', 'OK', 'ERROR'][code], description: null });
console.log(JSON.stringify(exporter.getFinishedSpans().map((span) => ({
  name: span.name,
  trace_id: span.spanContext().traceId,
  span_id: span.spanContext().spanId,
  parent_id: span.parentSpanContext?.spanId ?? null,
  status: status(span.status.code),
  attributes: span.attributes,
  events: span.events.map(({ name, attributes, time }) => ({ name, attributes, timestamp: seconds(time) })),
  start_time: seconds(span.startTime),
  end_time: seconds(span.endTime),
}))));
process.exit(0);
