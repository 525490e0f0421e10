// Streams a continuation: node example.js [HOST:PORT] [PROMPT]

import { Client } from "./client.js";

const [target = "127.0.0.1:50051", text = "Once upon a time"] = process.argv.slice(2);
const client = new Client(target);
try {
  for await (const { delta, finish } of client.generate({ text, stopping: { maxTokens: 64 } })) {
    process.stdout.write(delta?.text ?? "");
    if (finish) console.log(`\n[${finish.reason}, ${finish.usage.completionTokens} tokens]`);
  }
} catch (error) {
  console.error(`${error.code}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
