package io.github.hsrpc;

import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.ManagedChannelBuilder;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** What a channel has unless its user changes it. */
final class ChannelDefaults {
    /** Of one call. Both statuses come before the server did anything for it. */
    private static final Map<String, Object> RETRY_POLICY = Map.of(
            "maxAttempts", 5.0,
            "initialBackoff", "0.5s",
            "maxBackoff", "10s",
            "backoffMultiplier", 2.0,
            "retryableStatusCodes", List.of("UNAVAILABLE", "RESOURCE_EXHAUSTED"));

    /** An empty name stands for every method. */
    private static final Map<String, Object> SERVICE_CONFIG = Map.of(
            "loadBalancingConfig", List.of(Map.of("round_robin", Map.of())),
            "methodConfig", List.of(Map.of("name", List.of(Map.of()), "retryPolicy", RETRY_POLICY)));

    /** The server takes one ping in 10 s without data. */
    private static final int KEEPALIVE_SECONDS = 30;

    private static final int KEEPALIVE_TIMEOUT_SECONDS = 10;

    /** The server's largest request: one that is not kept is not tried again. */
    private static final int RETRY_BYTES = 4 << 20;

    private ChannelDefaults() {}

    static ManagedChannelBuilder<?> newBuilder(String target, ChannelCredentials credentials) {
        return Grpc.newChannelBuilder(target, credentials)
                .defaultServiceConfig(SERVICE_CONFIG)
                .enableRetry()
                .perRpcBufferLimit(RETRY_BYTES)
                .keepAliveTime(KEEPALIVE_SECONDS, TimeUnit.SECONDS)
                .keepAliveTimeout(KEEPALIVE_TIMEOUT_SECONDS, TimeUnit.SECONDS);
    }
}
