import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import type { DescMethodStreaming, DescMethodUnary, MessageInitShape, MessageShape, DescMessage } from "@bufbuild/protobuf";
import type * as grpc from "@grpc/grpc-js";
import { callMetadata, openChannel, type ClientOptions } from "./channel.js";
import { callError } from "./errors.js";
import { Stream } from "./stream.js";
import { ChatSchema, GenerateRequestSchema, GenerationService, ModelService, ServerService, TokenIdsSchema } from "./v1.js";
import type { GetModelResponse, GetServerInfoResponse, MessageSchema } from "./v1.js";

/** Settings of a request; what is left out has the default that the proto files give, and 0 is a value. */
export type Settings = Omit<MessageInitShape<typeof GenerateRequestSchema>, "input" | "$typeName" | "$unknown">;

/** One turn of a conversation, such as `{ role: "user", content: "Hi" }`. */
export type ChatMessage = MessageInitShape<typeof MessageSchema>;

/** A conversation with more than its messages: tools, parameters of the template, what follows. */
export type Chat = MessageInitShape<typeof ChatSchema>;

/** What concerns one call, and not the request. */
export interface CallOptions {
  /** Milliseconds after which it ends with DEADLINE_EXCEEDED, and its work with it. */
  timeout?: number;
  /** Cancels the call, and stops its work. */
  signal?: AbortSignal;
}

type Input = MessageShape<typeof GenerateRequestSchema>["input"];

/** Calls a server. Calls are retried, spread over all addresses of the target, and the connection is kept alive. */
export class Client {
  readonly #channel: grpc.Client;
  readonly #metadata: grpc.Metadata;
  readonly #timeout: number | undefined;

  /** @param target host:port, or any name that gRPC takes, such as dns:///models.example:50051 */
  constructor(target: string, options: ClientOptions = {}) {
    this.#channel = openChannel(target, options);
    this.#metadata = callMetadata(options.token);
    this.#timeout = options.timeout;
  }

  /** Continues a prompt, given as text or as token ids. */
  generate(prompt: string | readonly number[], settings: Settings = {}, options: CallOptions = {}): Stream {
    const input: Input =
      typeof prompt === "string"
        ? { case: "text", value: prompt }
        : { case: "tokenIds", value: create(TokenIdsSchema, { ids: [...prompt] }) };
    return this.#generate(input, settings, options);
  }

  /** Answers a conversation, of which the model's own template makes the prompt. */
  chat(chat: readonly ChatMessage[] | Chat, settings: Settings = {}, options: CallOptions = {}): Stream {
    const value = create(ChatSchema, isMessages(chat) ? { messages: [...chat] } : chat);
    return this.#generate({ case: "chat", value }, settings, options);
  }

  /** Ends a live request, whose call then ends well, with what there is; false: there is none of that id. */
  async abort(requestId: string, options: CallOptions = {}): Promise<boolean> {
    return (await this.#unary(GenerationService.method.abort, { requestId }, options)).aborted;
  }

  getModel(options: CallOptions = {}): Promise<GetModelResponse> {
    return this.#unary(ModelService.method.getModel, {}, options);
  }

  async tokenize(text: string, options: CallOptions = {}): Promise<number[]> {
    return (await this.#unary(ModelService.method.tokenize, { text }, options)).tokenIds;
  }

  async detokenize(tokenIds: readonly number[], options: CallOptions = {}): Promise<string> {
    return (await this.#unary(ModelService.method.detokenize, { tokenIds: [...tokenIds] }, options)).text;
  }

  getServerInfo(options: CallOptions = {}): Promise<GetServerInfoResponse> {
    return this.#unary(ServerService.method.getServerInfo, {}, options);
  }

  /** Ends the connections; calls that run end with CANCELLED. */
  close(): void {
    this.#channel.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #generate(input: Input, settings: Settings, options: CallOptions): Stream {
    const request = create(GenerateRequestSchema, { ...settings, input });
    const { path, serialize, deserialize } = wire(GenerationService.method.generate);
    return new Stream(() => {
      const how = [this.#metadata, this.#callOptions(options)] as const;
      const call = this.#channel.makeServerStreamRequest(path, serialize, deserialize, request, ...how);
      cancelOn(options.signal, call);
      return call;
    });
  }

  #unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    init: MessageInitShape<I>,
    options: CallOptions,
  ): Promise<MessageShape<O>> {
    const { path, serialize, deserialize } = wire(method);
    return new Promise((resolve, reject) => {
      const request = create(method.input, init);
      const done: grpc.requestCallback<MessageShape<O>> = (error, response) =>
        error ? reject(callError(error)) : resolve(response!);
      const how = [this.#metadata, this.#callOptions(options), done] as const;
      cancelOn(options.signal, this.#channel.makeUnaryRequest(path, serialize, deserialize, request, ...how));
    });
  }

  #callOptions({ timeout = this.#timeout }: CallOptions): grpc.CallOptions {
    return timeout === undefined ? {} : { deadline: Date.now() + timeout };
  }
}

/** A method as gRPC calls it. */
function wire<I extends DescMessage, O extends DescMessage>(method: DescMethodUnary<I, O> | DescMethodStreaming<I, O>) {
  return {
    path: `/${method.parent.typeName}/${method.name}`,
    serialize: (message: MessageShape<I>) => Buffer.from(toBinary(method.input, message)),
    deserialize: (bytes: Buffer) => fromBinary(method.output, bytes),
  };
}

function cancelOn(signal: AbortSignal | undefined, call: grpc.ClientReadableStream<unknown> | grpc.ClientUnaryCall): void {
  if (signal === undefined) return;
  const cancel = () => call.cancel();
  if (signal.aborted) cancel();
  signal.addEventListener("abort", cancel, { once: true });
  call.once("status", () => signal.removeEventListener("abort", cancel));
}

function isMessages(chat: readonly ChatMessage[] | Chat): chat is readonly ChatMessage[] {
  return Array.isArray(chat);
}
