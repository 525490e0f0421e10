// Streams a continuation, after `make build`: node example.js [HOST:PORT] [PROMPT]

import { CallError, Client, FinishReason } from "hsrpc-client";

const [target = "localhost:50051", prompt = "Once upon a time"] = process.argv.slice(2);
const client = new Client(target);
try {
  const stream = client.generate(prompt, { stopping: { maxTokens: 64 } });
  for await (const { text } of stream) process.stdout.write(text);
  console.log(`\n[${FinishReason[stream.finish.reason]}, ${stream.finish.usage.completionTokens} tokens]`);
} catch (error) {
  if (!(error instanceof CallError)) throw error;
  console.error(`${error.code}: ${error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
