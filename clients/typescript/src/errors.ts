import { fromBinary } from "@bufbuild/protobuf";
import { anyUnpack, type Any } from "@bufbuild/protobuf/wkt";
import * as grpc from "@grpc/grpc-js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { StatusSchema } from "./gen/google/rpc/status_pb.js";

/** Name of a status, such as "INVALID_ARGUMENT". */
export type Code = keyof typeof grpc.status;

/** A field of the request that is wrong. */
export interface FieldViolation {
  /** Its path, such as "sampling.top_p". */
  field: string;
  description: string;
}

/** A call ended with a status that is not OK; with the details that the server sent. */
export class CallError extends Error {
  override readonly name = "CallError";
  readonly fields: readonly FieldViolation[] = [];
  /** Seconds after which the server asks to be called again. */
  readonly retryDelay: number | undefined;
  /** To switch on, within `domain`. */
  readonly reason: string | undefined;
  readonly domain: string | undefined;
  /** What belongs to `reason`. */
  readonly metadata: Readonly<Record<string, string>> = {};

  constructor(
    readonly code: Code,
    message: string,
    details: readonly Any[] = [],
    options?: ErrorOptions,
  ) {
    super(message, options);
    for (const detail of details) {
      const bad = anyUnpack(detail, BadRequestSchema);
      const retry = anyUnpack(detail, RetryInfoSchema);
      const info = anyUnpack(detail, ErrorInfoSchema);
      if (bad) this.fields = bad.fieldViolations.map(({ field, description }) => ({ field, description }));
      if (retry?.retryDelay) this.retryDelay = Number(retry.retryDelay.seconds) + retry.retryDelay.nanos / 1e9;
      if (info) ({ reason: this.reason, domain: this.domain, metadata: this.metadata } = info);
    }
  }
}

/** What is thrown in place of gRPC's own error; any other is passed on. */
export function callError(error: unknown): unknown {
  if (!isServiceError(error)) return error;
  const [trailer] = error.metadata.get("grpc-status-details-bin");
  const details = trailer instanceof Uint8Array ? fromBinary(StatusSchema, trailer).details : [];
  return new CallError(grpc.status[error.code] as Code, error.details, details, { cause: error });
}

function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && "metadata" in error && error.metadata instanceof grpc.Metadata;
}
