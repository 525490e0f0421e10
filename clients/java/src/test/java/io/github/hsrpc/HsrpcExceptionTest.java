package io.github.hsrpc;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertSame;
import static org.junit.Assert.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import io.github.hsrpc.internal.rpc.BadRequest;
import io.github.hsrpc.internal.rpc.ErrorInfo;
import io.github.hsrpc.internal.rpc.LocalizedMessage;
import io.github.hsrpc.internal.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import org.junit.Test;

/** What an exception tells of a status and its details. */
public final class HsrpcExceptionTest {
    private static final Metadata.Key<byte[]> DETAILS =
            Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

    @Test
    public void detailsAreRead() {
        BadRequest.Builder badRequest = BadRequest.newBuilder();
        badRequest.addFieldViolationsBuilder().setField("sampling.top_p").setDescription("2.0 is too much");
        RetryInfo.Builder retryInfo = RetryInfo.newBuilder();
        retryInfo.getRetryDelayBuilder().setSeconds(1).setNanos(500_000_000);
        ErrorInfo.Builder errorInfo =
                ErrorInfo.newBuilder().setReason("LOADING").setDomain("hsrpc").putMetadata("model", "opt");
        HsrpcException error = exception(trailers(
                Any.pack(LocalizedMessage.getDefaultInstance()),
                Any.pack(badRequest.build()),
                Any.pack(retryInfo.build()),
                Any.pack(errorInfo.build())));
        assertEquals("sampling.top_p", error.fieldViolations().get(0).field());
        assertEquals("2.0 is too much", error.fieldViolations().get(0).description());
        assertEquals(Optional.of(Duration.ofMillis(1500)), error.retryDelay());
        assertEquals(Optional.of("LOADING"), error.reason());
        assertEquals(Optional.of("hsrpc"), error.domain());
        assertEquals(Map.of("model", "opt"), error.metadata());
    }

    @Test
    public void withoutDetailsThereAreNone() {
        Metadata foreign = new Metadata();
        foreign.put(DETAILS, "no message".getBytes(StandardCharsets.UTF_8));
        Any broken = Any.pack(RetryInfo.getDefaultInstance()).toBuilder()
                .setValue(ByteString.copyFromUtf8("no message"))
                .build();
        for (Metadata trailers : new Metadata[] {null, new Metadata(), foreign, trailers(broken)}) {
            HsrpcException error = exception(trailers);
            assertEquals(Status.Code.UNAVAILABLE, error.code());
            assertTrue(error.fieldViolations().isEmpty());
            assertTrue(error.retryDelay().isEmpty());
            assertTrue(error.reason().isEmpty());
            assertTrue(error.domain().isEmpty());
            assertTrue(error.metadata().isEmpty());
        }
    }

    @Test
    public void theMessageSaysWhatTheConnectionFailedBy() {
        Status status = Status.UNAVAILABLE
                .withDescription("io exception\nChannel Pipeline: [a, b]")
                .withCause(new IllegalStateException("no route: /10.0.0.1", new IllegalStateException("no route")));
        StatusRuntimeException cause = status.asRuntimeException();
        HsrpcException error = HsrpcException.of(cause);
        assertEquals("UNAVAILABLE: io exception: no route: /10.0.0.1", error.getMessage());
        assertSame(cause, error.getCause());
    }

    private static HsrpcException exception(Metadata trailers) {
        return HsrpcException.of(new StatusRuntimeException(Status.UNAVAILABLE.withDescription("later"), trailers));
    }

    private static Metadata trailers(Any... details) {
        Metadata trailers = new Metadata();
        trailers.put(
                DETAILS,
                io.github.hsrpc.internal.rpc.Status.newBuilder()
                        .addAllDetails(List.of(details))
                        .build()
                        .toByteArray());
        return trailers;
    }
}
