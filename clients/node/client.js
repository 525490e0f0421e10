// A small client of hsrpc: it loads ../../proto when it starts, so there is no generated code.

import { promisify } from "node:util";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTO_DIR = fileURLToPath(new URL("../../proto", import.meta.url));
const FILES = ["generation", "model", "server"].map((name) => `hsrpc/v1/${name}.proto`);
// 64-bit numbers are strings, since a JavaScript number cannot hold them; absent messages are null.
const OPTIONS = { keepCase: false, longs: String, enums: String, defaults: true, oneofs: true, includeDirs: [PROTO_DIR] };

const { hsrpc } = grpc.loadPackageDefinition(protoLoader.loadSync(FILES, OPTIONS));

/** Calls a server. Requests and responses are the messages of ../../proto, with names in camelCase. */
export class Client {
  /** @param {string} target host:port */
  constructor(target, credentials = grpc.credentials.createInsecure()) {
    this.generation = new hsrpc.v1.GenerationService(target, credentials);
    this.model = new hsrpc.v1.ModelService(target, credentials);
    this.server = new hsrpc.v1.ServerService(target, credentials);
  }

  /**
   * Yields the responses to a request; leaving the loop cancels the call, and the server stops the work.
   * @param {object} request a GenerateRequest, such as {text: "Once upon a time", stopping: {maxTokens: 64}}
   * @param {{timeout?: number}} options timeout in milliseconds
   */
  async *generate(request, { timeout } = {}) {
    const call = this.generation.generate(request, { deadline: deadline(timeout) });
    try {
      for await (const response of call) yield response;
    } finally {
      call.cancel();
    }
  }

  /** The whole output: {text, start, finish}. */
  async complete(request, options) {
    const output = { text: "", start: null, finish: null };
    for await (const { start, delta, finish } of this.generate(request, options)) {
      output.text += delta?.text ?? "";
      output.start ??= start;
      output.finish ??= finish;
    }
    return output;
  }

  async abort(requestId) {
    return (await unary(this.generation, "abort", { requestId })).aborted;
  }

  getModel() {
    return unary(this.model, "getModel", {});
  }

  async tokenize(text) {
    return (await unary(this.model, "tokenize", { text })).tokenIds;
  }

  async detokenize(tokenIds) {
    return (await unary(this.model, "detokenize", { tokenIds })).text;
  }

  getServerInfo() {
    return unary(this.server, "getServerInfo", {});
  }

  close() {
    for (const service of [this.generation, this.model, this.server]) service.close();
  }
}

export const status = grpc.status;

function unary(service, method, request) {
  return promisify(service[method]).call(service, request);
}

function deadline(timeout) {
  return timeout === undefined ? Infinity : Date.now() + timeout;
}
