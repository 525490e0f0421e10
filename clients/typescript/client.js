// A small client of hsrpc: it loads ../../proto when it starts, so there is no generated code.

import { readFileSync } from "node:fs";
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
  /**
   * Without a CA, a certificate or credentials of your own the connection is not encrypted.
   * @param {string} target host:port
   * @param {{token?: string, tlsCa?: string, tlsCert?: string, tlsKey?: string, credentials?: object, options?: object}}
   *   settings a bearer token; PEM files of the server's roots, and of the client's certificate and key; channel options
   */
  constructor(target, { token, tlsCa, tlsCert, tlsKey, credentials, options } = {}) {
    const direct = isLoopback(target) ? { "grpc.enable_http_proxy": 0 } : {};
    const channel = [target, credentials ?? channelCredentials(tlsCa, tlsCert, tlsKey), { ...direct, ...options }];
    this.metadata = new grpc.Metadata();
    if (token !== undefined) this.metadata.set("authorization", `Bearer ${token}`);
    this.generation = new hsrpc.v1.GenerationService(...channel);
    this.model = new hsrpc.v1.ModelService(...channel);
    this.server = new hsrpc.v1.ServerService(...channel);
  }

  /**
   * Yields the responses to a request; leaving the loop cancels the call, and the server stops the work.
   * @param {object} request a GenerateRequest, such as {text: "Once upon a time", stopping: {maxTokens: 64}}
   * @param {{timeout?: number}} options timeout in milliseconds
   */
  async *generate(request, { timeout } = {}) {
    const call = this.generation.generate(request, this.metadata, { deadline: deadline(timeout) });
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
    return (await this.#unary(this.generation, "abort", { requestId })).aborted;
  }

  getModel() {
    return this.#unary(this.model, "getModel", {});
  }

  async tokenize(text) {
    return (await this.#unary(this.model, "tokenize", { text })).tokenIds;
  }

  async detokenize(tokenIds) {
    return (await this.#unary(this.model, "detokenize", { tokenIds })).text;
  }

  getServerInfo() {
    return this.#unary(this.server, "getServerInfo", {});
  }

  close() {
    for (const service of [this.generation, this.model, this.server]) service.close();
  }

  #unary(service, method, request) {
    return promisify(service[method]).call(service, request, this.metadata);
  }
}

export const status = grpc.status;

function channelCredentials(ca, cert, key) {
  if (!ca && !cert) return grpc.credentials.createInsecure();
  const read = (file) => (file ? readFileSync(file) : null);
  return grpc.credentials.createSsl(read(ca), read(key), read(cert));
}

/** No proxy, whatever the environment says, can reach a server on this machine. */
function isLoopback(target) {
  return /^(dns:|ipv[46]:)?\/*(localhost|127\.[\d.]+|\[::1\]|::1)(:\d+)?$/.test(target);
}

function deadline(timeout) {
  return timeout === undefined ? Infinity : Date.now() + timeout;
}
