package io.github.hsrpc;

import io.github.hsrpc.v1.AbortRequest;
import io.github.hsrpc.v1.Chat;
import io.github.hsrpc.v1.DetokenizeRequest;
import io.github.hsrpc.v1.GenerateRequest;
import io.github.hsrpc.v1.GenerationServiceGrpc;
import io.github.hsrpc.v1.GetModelRequest;
import io.github.hsrpc.v1.GetModelResponse;
import io.github.hsrpc.v1.GetServerInfoRequest;
import io.github.hsrpc.v1.GetServerInfoResponse;
import io.github.hsrpc.v1.Load;
import io.github.hsrpc.v1.Message;
import io.github.hsrpc.v1.ModelServiceGrpc;
import io.github.hsrpc.v1.ServerServiceGrpc;
import io.github.hsrpc.v1.TokenIds;
import io.github.hsrpc.v1.TokenizeRequest;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientInterceptor;
import io.grpc.ClientInterceptors;
import io.grpc.ConnectivityState;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.AbstractStub;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * Client of a server, or of all servers that its target's name stands for.
 *
 * <pre>{@code
 * try (HsrpcClient client = HsrpcClient.create("localhost:50051");
 *         GenerationStream story = client.generate("Once upon a time")) {
 *     for (Delta delta : story) {
 *         System.out.print(delta.getText());
 *     }
 * }
 * }</pre>
 *
 * <p>Calls go to every address of the target in turn. A call that is refused with {@code UNAVAILABLE} or {@code
 * RESOURCE_EXHAUSTED}, or reaches no server, is made again, five times in all, when the server says or else after a
 * tenth of a second and more; never once its first message has come. A connection with calls on it is probed after 30
 * silent seconds. {@link Builder#channel} changes that.
 *
 * <p>Safe for use by many threads, which share its connections: make one and keep it. A {@link GenerationStream}
 * belongs to one thread at a time.
 */
public final class HsrpcClient implements AutoCloseable {
    private static final Duration CLOSE_TIME = Duration.ofSeconds(5);
    private static final Duration POLL_INTERVAL = Duration.ofMillis(200);

    private final ManagedChannel connections;
    private final Channel channel;
    private final Optional<Duration> deadline;
    private final GenerationServiceGrpc.GenerationServiceBlockingStub generation;
    private final ModelServiceGrpc.ModelServiceBlockingStub model;
    private final ServerServiceGrpc.ServerServiceBlockingStub server;

    private HsrpcClient(ManagedChannel connections, Channel channel, Optional<Duration> deadline) {
        this.connections = connections;
        this.channel = channel;
        this.deadline = deadline;
        generation = GenerationServiceGrpc.newBlockingStub(channel);
        model = ModelServiceGrpc.newBlockingStub(channel);
        server = ServerServiceGrpc.newBlockingStub(channel);
    }

    /**
     * Makes a client without TLS and token.
     *
     * @param target {@code host:port}, or a name as gRPC takes them, such as {@code dns:///servers.example:50051}
     * @return the client, which connects at its first call
     */
    public static HsrpcClient create(String target) {
        return builder(target).build();
    }

    /**
     * Begins a client with settings of its own.
     *
     * @param target {@code host:port}, or a name as gRPC takes them, such as {@code dns:///servers.example:50051}
     * @return a builder, by itself without TLS and token
     */
    public static Builder builder(String target) {
        return new Builder(target);
    }

    /**
     * Starts a request with the default settings of the server.
     *
     * @param prompt the text to continue
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream generate(String prompt) {
        return generate(prompt, GenerateOptions.defaults());
    }

    /**
     * Starts a request.
     *
     * @param prompt the text to continue
     * @param options how to continue it
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream generate(String prompt, GenerateOptions options) {
        return generate(options.request().setText(prompt).build(), options.deadline());
    }

    /**
     * Starts a request.
     *
     * @param tokenIds the prompt, as the model's tokens
     * @param options how to continue it
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream generate(List<Integer> tokenIds, GenerateOptions options) {
        TokenIds ids = TokenIds.newBuilder().addAllIds(tokenIds).build();
        return generate(options.request().setTokenIds(ids).build(), options.deadline());
    }

    /**
     * Starts a request that was put together by hand.
     *
     * @param request prompt and settings
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream generate(GenerateRequest request) {
        return generate(request, Optional.empty());
    }

    /**
     * Starts the answer to a conversation, with the default settings of the server.
     *
     * @param messages what was said, first to last; {@link Messages} makes the usual ones
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream chat(List<Message> messages) {
        return chat(messages, GenerateOptions.defaults());
    }

    /**
     * Starts the answer to a conversation.
     *
     * @param messages what was said, first to last; {@link Messages} makes the usual ones
     * @param options how to answer it
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream chat(List<Message> messages, GenerateOptions options) {
        return chat(Chat.newBuilder().addAllMessages(messages).build(), options);
    }

    /**
     * Starts the answer to a conversation with tools, or with parameters of the model's template.
     *
     * @param chat the conversation
     * @param options how to answer it
     * @return the output as it comes; to be closed, or read to its end
     */
    public GenerationStream chat(Chat chat, GenerateOptions options) {
        return generate(options.request().setChat(chat).build(), options.deadline());
    }

    private GenerationStream generate(GenerateRequest request, Optional<Duration> ownDeadline) {
        return new GenerationStream(ready(generation, ownDeadline.or(() -> deadline)), request);
    }

    /**
     * Ends a live request, whose call then finishes with what it has so far.
     *
     * @param requestId the id, from the request's options or its {@link GenerationStream#start}
     * @return whether there was one to end
     * @throws HsrpcException if the call fails
     */
    public boolean abort(String requestId) {
        AbortRequest request = AbortRequest.newBuilder().setRequestId(requestId).build();
        return call(() -> ready(generation, deadline).abort(request)).getAborted();
    }

    /**
     * Describes the model that is loaded.
     *
     * @return its name, sizes, and whether it takes conversations
     * @throws HsrpcException if the call fails
     */
    public GetModelResponse getModel() {
        return call(() -> ready(model, deadline).getModel(GetModelRequest.getDefaultInstance()));
    }

    /**
     * Turns text into tokens.
     *
     * @param text a prompt
     * @return the ids of the tokens that a request with this prompt has
     * @throws HsrpcException if the call fails
     */
    public List<Integer> tokenize(String text) {
        TokenizeRequest request = TokenizeRequest.newBuilder().setText(text).build();
        return call(() -> ready(model, deadline).tokenize(request)).getTokenIdsList();
    }

    /**
     * Turns tokens into text, without special ones.
     *
     * @param tokenIds ids of the model's tokens
     * @return their text
     * @throws HsrpcException if the call fails
     */
    public String detokenize(List<Integer> tokenIds) {
        DetokenizeRequest request = DetokenizeRequest.newBuilder().addAllTokenIds(tokenIds).build();
        return call(() -> ready(model, deadline).detokenize(request)).getText();
    }

    /**
     * Describes the server.
     *
     * @return its version, its plan, and what was measured
     * @throws HsrpcException if the call fails
     */
    public GetServerInfoResponse getServerInfo() {
        return call(() -> ready(server, deadline).getServerInfo(GetServerInfoRequest.getDefaultInstance()));
    }

    /**
     * Tells how busy the server is.
     *
     * @return requests that wait and run, and memory in use
     * @throws HsrpcException if the call fails
     */
    public Load getLoad() {
        return getServerInfo().getLoad();
    }

    /**
     * Waits until the server answers and has loaded its model.
     *
     * @param time how long to wait
     * @throws HsrpcException with {@code DEADLINE_EXCEEDED} if it has not by then; or if it refuses the call for
     *     another reason than that it is not there yet
     */
    public void waitReady(Duration time) {
        long end = System.nanoTime() + time.toNanos();
        while (true) {
            Duration left = Duration.ofNanos(end - System.nanoTime());
            try {
                call(() -> ready(model, Optional.of(left)).getModel(GetModelRequest.getDefaultInstance()));
                return;
            } catch (HsrpcException error) {
                if (error.code() != Status.Code.UNAVAILABLE) {
                    throw error;
                }
            }
            sleep(POLL_INTERVAL);
        }
    }

    /**
     * Gives the channel, for generated stubs of your own, such as those of {@code ServerServiceGrpc.watchLoad} or of
     * the health service.
     *
     * @return a channel of which every call brings the client's token
     */
    public Channel channel() {
        return channel;
    }

    /** Ends all calls, and the connections; a later call fails. */
    @Override
    public void close() {
        connections.shutdownNow();
        try {
            connections.awaitTermination(CLOSE_TIME.toMillis(), TimeUnit.MILLISECONDS);
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    /** A stub for one call. A server that was away is sought at once, not when the next attempt is due. */
    private <S extends AbstractStub<S>> S ready(S stub, Optional<Duration> time) {
        if (connections.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
            connections.resetConnectBackoff();
        }
        return time.map(limit -> stub.withDeadlineAfter(limit.toNanos(), TimeUnit.NANOSECONDS)).orElse(stub);
    }

    private static <T> T call(Supplier<T> method) {
        try {
            return method.get();
        } catch (StatusRuntimeException error) {
            throw HsrpcException.of(error);
        }
    }

    private static void sleep(Duration time) {
        try {
            Thread.sleep(time.toMillis());
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
            throw HsrpcException.of(Status.CANCELLED.withDescription("interrupted while waiting").asRuntimeException());
        }
    }

    /** Settings of a client. */
    public static final class Builder {
        private final String target;
        private Optional<TlsChannelCredentials.Builder> tls = Optional.empty();
        private Optional<TokenCredentials> token = Optional.empty();
        private Optional<Duration> deadline = Optional.empty();
        private Consumer<ManagedChannelBuilder<?>> change = channel -> {};

        private Builder(String target) {
            this.target = target;
        }

        /**
         * Turns TLS on, trusting the roots of the Java platform.
         *
         * @return this builder
         */
        public Builder tls() {
            tls = tls.or(() -> Optional.of(TlsChannelCredentials.newBuilder()));
            return this;
        }

        /**
         * Turns TLS on, trusting only the roots in a file.
         *
         * @param file certificates in PEM
         * @return this builder
         * @throws UncheckedIOException if the file cannot be read
         */
        public Builder tlsCa(Path file) {
            tls();
            try {
                tls.get().trustManager(file.toFile());
            } catch (IOException error) {
                throw new UncheckedIOException("tlsCa: cannot read " + error.getMessage(), error);
            }
            return this;
        }

        /**
         * Turns TLS on, with a certificate of the client's own for servers that ask for one.
         *
         * @param certificate file of the certificate, and of those between it and its root, in PEM
         * @param key file of its private key, in PEM, not encrypted
         * @return this builder
         * @throws UncheckedIOException if a file cannot be read
         * @throws IllegalArgumentException if there is no key in the file of the key
         */
        public Builder tlsCertificate(Path certificate, Path key) {
            tls();
            try (InputStream chain = Files.newInputStream(certificate);
                    InputStream pem = PrivateKeyFile.read(key)) {
                tls.get().keyManager(chain, pem);
            } catch (IOException error) {
                throw new UncheckedIOException("tlsCertificate: cannot read " + error.getMessage(), error);
            }
            return this;
        }

        /**
         * Sends a bearer token with every call. Without TLS it travels in the clear.
         *
         * @param token the token alone
         * @return this builder
         * @throws IllegalArgumentException if it is empty, or not printable ASCII
         */
        public Builder token(String token) {
            this.token = Optional.of(new TokenCredentials(token));
            return this;
        }

        /**
         * Sets how long a call may take as a whole, where its options say nothing else. Without it there is no end.
         *
         * @param time more than zero
         * @return this builder
         * @throws IllegalArgumentException if the time is not more than zero
         */
        public Builder deadline(Duration time) {
            deadline = Optional.of(GenerateOptions.checkDeadline(time));
            return this;
        }

        /**
         * Changes settings of gRPC's channel, such as its largest message or its authority, after all others.
         *
         * @param change called with the channel's builder when the client is built
         * @return this builder
         */
        public Builder channel(Consumer<ManagedChannelBuilder<?>> change) {
            this.change = this.change.andThen(change);
            return this;
        }

        /**
         * Makes the client, which connects at its first call.
         *
         * @return the client
         * @throws IllegalArgumentException if the target is no name that gRPC knows, or a file of TLS does not hold
         *     what it should
         */
        public HsrpcClient build() {
            ManagedChannel connections = ChannelDefaults.open(target, credentials(), change);
            ClientInterceptor[] interceptors = token.stream().toArray(ClientInterceptor[]::new);
            return new HsrpcClient(connections, ClientInterceptors.intercept(connections, interceptors), deadline);
        }

        private ChannelCredentials credentials() {
            return tls.isPresent() ? tls.get().build() : InsecureChannelCredentials.create();
        }
    }
}
