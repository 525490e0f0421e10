package io.github.hsrpc;

import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** What a channel has unless its user changes it. */
final class ChannelDefaults {
    /** Of one call. Both statuses come before the server did anything for it. */
    private static final Map<String, Object> RETRY_POLICY = Map.of(
            "maxAttempts", 5.0,
            "initialBackoff", "0.1s",
            "maxBackoff", "5s",
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

    private static final Pattern PORT = Pattern.compile("(?<=:)\\d{1,9}$");
    private static final int MAX_PORT = 65535;

    private ChannelDefaults() {}

    /**
     * Opens a channel.
     *
     * @throws IllegalArgumentException if it cannot be, with the target or the credentials as they are
     */
    static ManagedChannel open(
            String target, ChannelCredentials credentials, Consumer<ManagedChannelBuilder<?>> change) {
        try {
            checkPort(target);
            ManagedChannelBuilder<?> builder = Grpc.newChannelBuilder(target, credentials)
                    .defaultServiceConfig(SERVICE_CONFIG)
                    .enableRetry()
                    .perRpcBufferLimit(RETRY_BYTES)
                    .keepAliveTime(KEEPALIVE_SECONDS, TimeUnit.SECONDS)
                    .keepAliveTimeout(KEEPALIVE_TIMEOUT_SECONDS, TimeUnit.SECONDS);
            change.accept(builder);
            return builder.build();
        } catch (IllegalArgumentException error) {
            throw new IllegalArgumentException(
                    "no channel to \"" + target + "\": " + error.getMessage()
                            + "; give host:port ([host]:port for IPv6) or dns:///name:port, and PEM files for TLS",
                    error);
        }
    }

    /** gRPC's calls to a port that cannot be wait for ever. */
    private static void checkPort(String target) {
        Matcher port = PORT.matcher(target);
        if (port.find() && Integer.parseInt(port.group()) > MAX_PORT) {
            throw new IllegalArgumentException("port " + port.group() + " is beyond " + MAX_PORT);
        }
    }
}
