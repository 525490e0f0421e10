import { readFileSync } from "node:fs";
import * as grpc from "@grpc/grpc-js";

/** How a client reaches a server, and what it shows there. Without `tls` nothing is encrypted. */
export interface ClientOptions {
  /** Sent with every call as `authorization: Bearer TOKEN`; without TLS it travels in the clear. */
  token?: string;
  tls?: TlsOptions;
  /** Milliseconds after which a call ends with DEADLINE_EXCEEDED, unless it says otherwise; none by default. */
  timeout?: number;
  /** Options of the gRPC channel, before the client's own. */
  channel?: grpc.ChannelOptions;
}

/** PEM files. */
export interface TlsOptions {
  /** Roots that the server's certificate must come from; those of Node.js by default. */
  ca?: string;
  /** The client's own certificate, for servers that ask for one. */
  cert?: string;
  /** Its private key. */
  key?: string;
}

const SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{}],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: "0.1s",
        maxBackoff: "5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
      },
    },
  ],
};

/** What is in effect unless `ClientOptions.channel` has the same name. Pings are no more than the server allows. */
const DEFAULTS: grpc.ChannelOptions = {
  "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
  "grpc.per_rpc_retry_buffer_size": 4 << 20,
  "grpc.keepalive_time_ms": 30_000,
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.max_reconnect_backoff_ms": 1_000,
};

/** A channel to `target`, with the methods to call by. */
export function openChannel(target: string, { tls, channel }: ClientOptions): grpc.Client {
  // No proxy, whatever the environment says, can reach a server on this machine.
  const direct = isLoopback(target) ? { "grpc.enable_http_proxy": 0 } : {};
  return new grpc.Client(target, credentials(tls), { ...DEFAULTS, ...direct, ...channel });
}

/** What every call brings along. */
export function callMetadata(token: string | undefined): grpc.Metadata {
  const metadata = new grpc.Metadata();
  if (token !== undefined) metadata.set("authorization", `Bearer ${token}`);
  return metadata;
}

function credentials(tls: TlsOptions | undefined): grpc.ChannelCredentials {
  if (tls === undefined) return grpc.credentials.createInsecure();
  if ((tls.cert === undefined) !== (tls.key === undefined)) {
    throw new TypeError("tls.cert, tls.key: one without the other; give both, or neither");
  }
  const read = (file: string | undefined) => (file === undefined ? null : readFileSync(file));
  return grpc.credentials.createSsl(read(tls.ca), read(tls.key), read(tls.cert));
}

function isLoopback(target: string): boolean {
  return /^(dns:|ipv[46]:)?\/*(localhost|127\.[\d.]+|\[::1\]|::1)(:\d+)?$/.test(target);
}
