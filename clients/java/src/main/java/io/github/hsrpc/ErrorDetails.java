package io.github.hsrpc;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import io.github.hsrpc.internal.rpc.BadRequest;
import io.github.hsrpc.internal.rpc.ErrorInfo;
import io.github.hsrpc.internal.rpc.RetryInfo;
import io.github.hsrpc.internal.rpc.Status;
import io.grpc.Metadata;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.stream.Collectors;

/** What the trailer {@code grpc-status-details-bin} says of a failure; bytes that are none of it say nothing. */
final class ErrorDetails {
    private static final Metadata.Key<byte[]> KEY =
            Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

    private final Optional<BadRequest> badRequest;
    private final Optional<RetryInfo> retryInfo;
    private final Optional<ErrorInfo> errorInfo;

    private ErrorDetails(List<Any> details) {
        badRequest = find(details, BadRequest.class);
        retryInfo = find(details, RetryInfo.class);
        errorInfo = find(details, ErrorInfo.class);
    }

    /** The details in trailers, which may be null. */
    static ErrorDetails of(Metadata trailers) {
        byte[] bytes = trailers == null ? null : trailers.get(KEY);
        if (bytes == null) {
            return new ErrorDetails(List.of());
        }
        try {
            return new ErrorDetails(Status.parseFrom(bytes).getDetailsList());
        } catch (InvalidProtocolBufferException foreign) {
            return new ErrorDetails(List.of());
        }
    }

    List<FieldViolation> fieldViolations() {
        return badRequest.stream()
                .flatMap(details -> details.getFieldViolationsList().stream())
                .map(violation -> new FieldViolation(violation.getField(), violation.getDescription()))
                .collect(Collectors.toUnmodifiableList());
    }

    Optional<Duration> retryDelay() {
        return retryInfo
                .map(RetryInfo::getRetryDelay)
                .map(delay -> Duration.ofSeconds(delay.getSeconds(), delay.getNanos()));
    }

    Optional<String> reason() {
        return errorInfo.map(ErrorInfo::getReason);
    }

    Optional<String> domain() {
        return errorInfo.map(ErrorInfo::getDomain);
    }

    Map<String, String> metadata() {
        return errorInfo.map(ErrorInfo::getMetadataMap).map(Map::copyOf).orElse(Map.of());
    }

    private static <M extends Message> Optional<M> find(List<Any> details, Class<M> type) {
        return details.stream().filter(any -> any.is(type)).findFirst().map(any -> unpack(any, type));
    }

    private static <M extends Message> M unpack(Any any, Class<M> type) {
        try {
            return any.unpack(type);
        } catch (InvalidProtocolBufferException foreign) {
            return null;
        }
    }
}
