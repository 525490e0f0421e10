// Runs against the server at HSRPC_TARGET (host:port), with the token HSRPC_TOKEN and the roots in HSRPC_TLS_CA if set.

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { Client, status } from "../client.js";

const target = process.env.HSRPC_TARGET;
assert.ok(target, "HSRPC_TARGET must be host:port of a running server");
const settings = { token: process.env.HSRPC_TOKEN, tlsCa: process.env.HSRPC_TLS_CA };
const client = new Client(target, settings);
after(() => client.close());

test("the deltas are the text, the first response has start, the last one finish", async () => {
  const responses = [];
  for await (const response of client.generate({ text: "Hi", stopping: { maxTokens: 4 }, sampling: { temperature: 0 } })) {
    responses.push(response);
  }
  const text = responses.map(({ delta }) => delta?.text ?? "").join("");
  assert.ok(text.length > 0);
  assert.equal(responses[0].start.sampling.temperature, 0);
  assert.equal(responses[0].start.stopping.maxTokens, 4);
  assert.match(responses.at(-1).finish.reason, /^FINISH_REASON_(EOS|MAX_TOKENS)$/);
  assert.equal(responses.filter(({ finish }) => finish).length, 1);
});

test("complete returns the whole", async () => {
  const { text, start, finish } = await client.complete({ text: "Hi", output: { echoPrompt: true }, stopping: { maxTokens: 4 } });
  assert.ok(text.startsWith("Hi"));
  assert.ok(start.requestId);
  assert.ok(finish.usage.completionTokens > 0);
});

test("a conversation is a prompt", async () => {
  assert.ok((await client.getModel()).hasChatTemplate);
  const chat = { messages: [{ role: "user", content: "Hi" }], templateParameters: { fields: { x: { boolValue: true } } } };
  const { text } = await client.complete({ chat, output: { echoPrompt: true }, stopping: { maxTokens: 4 } });
  assert.ok(text.startsWith("user: Hi\n"));
});

test("leaving the loop stops the work", async () => {
  for await (const { start } of client.generate({ text: "Hi", requestId: "left-early" })) {
    assert.equal(start.requestId, "left-early");
    break;
  }
  const { start } = await client.complete({ text: "Hi", requestId: "left-early", stopping: { maxTokens: 1 } });
  assert.equal(start.requestId, "left-early");
});

test("a bad field is INVALID_ARGUMENT", async () => {
  await assert.rejects(client.complete({ text: "Hi", sampling: { topP: 2 } }), (error) => {
    assert.equal(error.code, status.INVALID_ARGUMENT);
    assert.match(error.details, /sampling\.top_p/);
    return true;
  });
});

test("the tokenizer goes there and back", async () => {
  assert.equal(await client.detokenize(await client.tokenize("Once")), "Once");
});

test("model and server describe themselves", async () => {
  const model = await client.getModel();
  assert.ok(model.sizes.numLayers > 0);
  assert.equal((await client.getServerInfo()).model, model.name);
  assert.equal(await client.abort("nobody"), false);
});
