/** Messages of the service, as generated from its proto files. */
export * from "./gen/hsrpc/v1/generation_pb.js";
export * from "./gen/hsrpc/v1/model_pb.js";
export * from "./gen/hsrpc/v1/prompt_pb.js";
export * from "./gen/hsrpc/v1/server_pb.js";
