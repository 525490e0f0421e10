// The conformance program: requests as JSON lines in, results as JSON lines out.

import { existsSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fromJson, type JsonValue } from "@bufbuild/protobuf";
import { CallError, Client, FinishReason } from "hsrpc-client";
import type { ClientOptions, Delta, Finish, Start, Stream, TokenLogprob } from "hsrpc-client";
import { GenerateRequestSchema } from "hsrpc-client/v1";

interface Request {
  id: string;
  target: string;
  tls: { ca: string; cert: string | null; key: string | null } | null;
  token: string | null;
  call: "generate" | "chat" | "text" | "chat_text";
  request: JsonValue;
  deadline_s: number | null;
  cancel_after: number | null;
  streams: number;
  repeat: number;
  pause_file: string | null;
}

async function answer(request: Request) {
  const client = new Client(request.target, access(request));
  try {
    const results = [];
    for (let repeat = 0; repeat < request.repeat; repeat++) {
      if (repeat > 0 && request.pause_file !== null) await pause(request.pause_file);
      results.push(...(await Promise.all(Array.from({ length: request.streams }, () => result(client, request)))));
    }
    return results;
  } finally {
    client.close();
  }
}

function access({ tls, token }: Request): ClientOptions {
  const files = tls && { ca: tls.ca, ...(tls.cert && tls.key ? { cert: tls.cert, key: tls.key } : {}) };
  return { ...(token === null ? {} : { token }), ...(files === null ? {} : { tls: files }) };
}

async function pause(file: string) {
  writeFileSync(`${file}.waiting`, "");
  while (!existsSync(file)) await sleep(10);
}

async function result(client: Client, request: Request) {
  const stream = begin(client, request);
  const output = new Output();
  try {
    if (request.call === "text" || request.call === "chat_text") {
      const { text, tokenIds, logprobs, start, finish } = await stream.completion();
      return { ...new Output(text, tokenIds, logprobs).result(start, finish), cancelled: false, error: null };
    }
    let cancelled = false;
    for await (const delta of stream) {
      output.add(delta);
      cancelled = output.deltas === request.cancel_after;
      if (cancelled) break;
    }
    return { ...output.result(stream.start, stream.finish), cancelled, error: null };
  } catch (error) {
    if (!(error instanceof CallError)) throw error;
    return { ...output.result(stream.start, stream.finish), cancelled: false, error: failure(error) };
  }
}

function begin(client: Client, { request, deadline_s }: Request): Stream {
  const { input, ...settings } = fromJson(GenerateRequestSchema, request);
  const options = deadline_s === null ? {} : { timeout: deadline_s * 1000 };
  if (input.case === "chat") return client.chat(input.value, settings, options);
  return client.generate(input.case === "tokenIds" ? input.value.ids : (input.value ?? ""), settings, options);
}

class Output {
  deltas = 0;

  constructor(
    private text = "",
    private readonly tokenIds: number[] = [],
    private readonly logprobs: TokenLogprob[] = [],
  ) {}

  add({ text, tokenIds, logprobs }: Delta) {
    if (text || tokenIds.length) this.deltas += 1;
    this.text += text;
    this.tokenIds.push(...tokenIds);
    this.logprobs.push(...logprobs);
  }

  result(start: Start | undefined, finish: Finish | undefined) {
    return {
      text: this.text,
      deltas: this.deltas,
      token_ids: this.tokenIds,
      logprobs: this.logprobs.map(({ tokenId, logprob, rank, top }) => ({
        ...{ token_id: tokenId, logprob, rank },
        top: top.map((each) => ({ token_id: each.tokenId, logprob: each.logprob })),
      })),
      prompt_tokens: finish?.usage?.promptTokens ?? start?.promptTokens ?? 0,
      completion_tokens: finish?.usage?.completionTokens ?? 0,
      finish_reason: finish ? `FINISH_REASON_${FinishReason[finish.reason]}` : null,
      stop_string: finish?.matched.case === "stopString" ? finish.matched.value : null,
    };
  }
}

function failure({ code, message, fields, retryDelay, reason, domain, metadata }: CallError) {
  return {
    ...{ code, message, fields, metadata },
    ...{ retry_delay_s: retryDelay ?? null, reason: reason ?? null, domain: domain ?? null },
  };
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line) as Request;
  console.log(JSON.stringify({ id: request.id, results: await answer(request) }));
}
