export type { ClientOptions, TlsOptions } from "./channel.js";
export { Client, type CallOptions, type Chat, type ChatMessage, type Settings } from "./client.js";
export { CallError, type Code, type FieldViolation } from "./errors.js";
export { Stream, type Completion } from "./stream.js";
export { FinishReason, type Delta, type Finish, type Start, type TokenLogprob, type Usage } from "./v1.js";
