// What needs no server; the rest is the conformance suite's.

import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { anyPack } from "@bufbuild/protobuf/wkt";
import { CallError, Client } from "hsrpc-client";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../dist/gen/google/rpc/error_details_pb.js";

const NOWHERE = "127.0.0.1:1";
const ONCE = { channel: { "grpc.enable_retries": 0 } };

test("a certificate comes with its key", () => {
  for (const tls of [{ cert: "me.pem" }, { key: "me.key" }]) {
    assert.throws(() => new Client(NOWHERE, { tls }), /tls\.cert, tls\.key: one without the other/);
  }
});

test("files are read as the client is made", () => {
  assert.throws(() => new Client(NOWHERE, { tls: { ca: "no-such.pem" } }), { code: "ENOENT" });
});

test("a stream is read once", async () => {
  const client = new Client(NOWHERE, ONCE);
  const stream = client.generate("Hi");
  await assert.rejects(stream.completion(), { name: "CallError", code: "UNAVAILABLE" });
  await assert.rejects(stream.completion(), /the stream was read already/);
  client.close();
});

test("a stream that nobody reads makes no call, and throws nowhere", () => {
  const client = new Client(NOWHERE, ONCE);
  client.generate("Hi");
  client.close();
});

test("a signal cancels streams and other calls, also one that is set already", async () => {
  const client = new Client(NOWHERE);
  const signal = AbortSignal.abort();
  await assert.rejects(client.generate("Hi", {}, { signal }).completion(), { code: "CANCELLED" });
  await assert.rejects(client.getModel({ signal }), { code: "CANCELLED" });
  client.close();
});

test("details of an error are decoded, each where it belongs", () => {
  const details = [
    anyPack(ErrorInfoSchema, create(ErrorInfoSchema, { reason: "R", domain: "hsrpc", metadata: { a: "b" } })),
    anyPack(RetryInfoSchema, create(RetryInfoSchema, { retryDelay: { seconds: 1n, nanos: 500_000_000 } })),
    anyPack(BadRequestSchema, create(BadRequestSchema, { fieldViolations: [{ field: "f", description: "d" }] })),
  ];
  const { code, message, fields, retryDelay, reason, domain, metadata } = new CallError("INTERNAL", "m", details);
  assert.deepEqual({ code, message, fields, retryDelay, reason, domain, metadata }, {
    ...{ code: "INTERNAL", message: "m", fields: [{ field: "f", description: "d" }], retryDelay: 1.5 },
    ...{ reason: "R", domain: "hsrpc", metadata: { a: "b" } },
  });
});
