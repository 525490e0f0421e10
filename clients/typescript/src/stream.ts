import { create } from "@bufbuild/protobuf";
import type { ClientReadableStream } from "@grpc/grpc-js";
import { CallError, callError } from "./errors.js";
import { DeltaSchema, type Delta, type Finish, type GenerateResponse, type Start, type TokenLogprob } from "./v1.js";

/** The whole output of a request. */
export interface Completion {
  text: string;
  tokenIds: number[];
  logprobs: TokenLogprob[];
  /** Of the prompt's tokens but the first, where they were asked for. */
  promptLogprobs: TokenLogprob[];
  start: Start;
  finish: Finish;
}

/** Deltas of one request, as they come. The call begins with the first `await`; leaving the loop stops its work. */
export class Stream implements AsyncIterable<Delta> {
  /** Facts about the prompt, and the settings in effect; there from the first delta on. */
  start: Start | undefined;
  /** How the request ended; there after the last delta. */
  finish: Finish | undefined;
  #begin: (() => ClientReadableStream<GenerateResponse>) | undefined;

  constructor(begin: () => ClientReadableStream<GenerateResponse>) {
    this.#begin = begin;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Delta, void, undefined> {
    const begin = this.#begin;
    if (begin === undefined) throw new TypeError("the stream was read already; make another call");
    this.#begin = undefined;
    const call = begin();
    try {
      for await (const response of call as AsyncIterable<GenerateResponse>) {
        this.start ??= response.start;
        this.finish ??= response.finish;
        yield response.delta ?? create(DeltaSchema);
      }
    } catch (error) {
      throw callError(error);
    } finally {
      call.cancel();
    }
    if (this.finish === undefined) throw new CallError("DATA_LOSS", "the stream ended before its last response");
  }

  /** The whole output, in place of its deltas. */
  async completion(): Promise<Completion> {
    const lists = { logprobs: [] as TokenLogprob[], promptLogprobs: [] as TokenLogprob[] };
    const output = { text: "", tokenIds: [] as number[], ...lists };
    for await (const { text, tokenIds, logprobs, promptLogprobs } of this) {
      output.text += text;
      output.tokenIds.push(...tokenIds);
      output.logprobs.push(...logprobs);
      output.promptLogprobs.push(...promptLogprobs);
    }
    return { ...output, start: this.start!, finish: this.finish! };
  }
}
