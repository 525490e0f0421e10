package io.github.hsrpc;

import io.grpc.CallCredentials;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import java.util.concurrent.Executor;

/** A bearer token, which every call of the channel brings that this intercepts. */
final class TokenCredentials extends CallCredentials implements ClientInterceptor {
    private static final Metadata.Key<String> KEY =
            Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

    private final String token;

    TokenCredentials(String token) {
        if (token.isEmpty() || !token.chars().allMatch(character -> ' ' <= character && character <= '~')) {
            throw new IllegalArgumentException(
                    "token: empty, or not printable ASCII; give the token alone, without a newline");
        }
        this.token = token;
    }

    @Override
    public void applyRequestMetadata(RequestInfo request, Executor executor, MetadataApplier applier) {
        Metadata headers = new Metadata();
        headers.put(KEY, "Bearer " + token);
        applier.apply(headers);
    }

    @Override
    public void thisUsesUnstableApi() {}

    @Override
    public <Q, R> ClientCall<Q, R> interceptCall(MethodDescriptor<Q, R> method, CallOptions options, Channel next) {
        return next.newCall(method, options.withCallCredentials(this));
    }
}
