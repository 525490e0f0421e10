package io.github.hsrpc;

import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.stream.Stream;

/**
 * A call that failed, with the details that the server gave. Its cause is gRPC's own exception, whose trailers have
 * all of them.
 */
public final class HsrpcException extends RuntimeException {
    private static final long serialVersionUID = 1;

    private final Status.Code code;
    private final List<FieldViolation> fieldViolations;
    private final Duration retryDelay;
    private final String reason;
    private final String domain;
    private final Map<String, String> metadata;

    private HsrpcException(StatusRuntimeException error, ErrorDetails details) {
        super(describe(error.getStatus()), error);
        code = error.getStatus().getCode();
        fieldViolations = details.fieldViolations();
        retryDelay = details.retryDelay().orElse(null);
        reason = details.reason().orElse(null);
        domain = details.domain().orElse(null);
        metadata = details.metadata();
    }

    static HsrpcException of(StatusRuntimeException error) {
        return new HsrpcException(error, ErrorDetails.of(error.getTrailers()));
    }

    /**
     * Says what kind of failure it is.
     *
     * @return the code of gRPC
     */
    public Status.Code code() {
        return code;
    }

    /**
     * Names the fields of the request that are wrong.
     *
     * @return a violation for each; empty if it was something else
     */
    public List<FieldViolation> fieldViolations() {
        return fieldViolations;
    }

    /**
     * Says when to try again.
     *
     * @return the time to wait; empty if trying again does not help, or the server does not know
     */
    public Optional<Duration> retryDelay() {
        return Optional.ofNullable(retryDelay);
    }

    /**
     * Gives a reason to switch on, such as {@code MODEL_NOT_FOUND}.
     *
     * @return the reason; empty if there is none
     */
    public Optional<String> reason() {
        return Optional.ofNullable(reason);
    }

    /**
     * Says whose word the reason is.
     *
     * @return {@code hsrpc}, or what stands between it and the client; empty if there is no reason
     */
    public Optional<String> domain() {
        return Optional.ofNullable(domain);
    }

    /**
     * Gives what belongs to the reason.
     *
     * @return values by name
     */
    public Map<String, String> metadata() {
        return metadata;
    }

    /** Code and first line of the status; where the connection failed, also what it failed by. */
    private static String describe(Status status) {
        StringBuilder words = new StringBuilder(status.getCode().name());
        Stream.ofNullable(status.getDescription()).flatMap(String::lines).limit(1).forEach(line -> add(words, line));
        for (Throwable cause = status.getCause(); cause != null; cause = cause.getCause()) {
            add(words, Objects.requireNonNullElse(cause.getMessage(), ""));
        }
        return words.toString();
    }

    private static void add(StringBuilder words, String more) {
        if (words.indexOf(more) < 0) {
            words.append(": ").append(more);
        }
    }
}
