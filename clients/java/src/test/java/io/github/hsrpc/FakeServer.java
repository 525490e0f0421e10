package io.github.hsrpc;

import io.github.hsrpc.v1.Delta;
import io.github.hsrpc.v1.Finish;
import io.github.hsrpc.v1.FinishReason;
import io.github.hsrpc.v1.GenerateRequest;
import io.github.hsrpc.v1.GenerateResponse;
import io.github.hsrpc.v1.GenerationServiceGrpc;
import io.github.hsrpc.v1.GetModelRequest;
import io.github.hsrpc.v1.GetModelResponse;
import io.github.hsrpc.v1.ModelServiceGrpc;
import io.github.hsrpc.v1.Start;
import io.grpc.Grpc;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;

/** A server on the loopback that answers the calls of Generate, one after the other, as it was told. */
final class FakeServer implements AutoCloseable {
    /** What is done with one call. */
    interface Answer {
        void to(GenerateRequest request, ServerCallStreamObserver<GenerateResponse> responses);
    }

    private static final Metadata.Key<String> AUTHORIZATION =
            Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

    final List<GenerateRequest> requests = new CopyOnWriteArrayList<>();
    /** The header {@code authorization} of each call. */
    final List<String> authorizations = new CopyOnWriteArrayList<>();

    private final List<Answer> answers;
    private final Server server;
    private final int port;

    /** The last answer is given again and again. */
    FakeServer(Answer... answers) throws IOException {
        this(0, answers);
    }

    FakeServer(int port, Answer... answers) throws IOException {
        this.answers = List.of(answers);
        server = Grpc.newServerBuilderForPort(port, InsecureServerCredentials.create())
                .addService(new Service())
                .addService(new Model())
                .intercept(new Headers())
                .build()
                .start();
        this.port = server.getPort();
    }

    int port() {
        return port;
    }

    String target() {
        return "127.0.0.1:" + port();
    }

    @Override
    public void close() {
        try {
            server.shutdownNow().awaitTermination();
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    static GenerateResponse first(String text) {
        return piece(text).toBuilder().setStart(Start.newBuilder().setRequestId("one")).build();
    }

    static GenerateResponse piece(String text) {
        return GenerateResponse.newBuilder().setDelta(Delta.newBuilder().setText(text)).build();
    }

    static GenerateResponse last() {
        Finish finish = Finish.newBuilder().setReason(FinishReason.FINISH_REASON_EOS).build();
        return GenerateResponse.newBuilder().setFinish(finish).build();
    }

    static Answer says(GenerateResponse... responses) {
        return (request, observer) -> {
            List.of(responses).forEach(observer::onNext);
            observer.onCompleted();
        };
    }

    static Answer fails(Status status) {
        return fails(status, new Metadata());
    }

    static Answer fails(Status status, Metadata trailers, GenerateResponse... before) {
        return (request, observer) -> {
            List.of(before).forEach(observer::onNext);
            observer.onError(new StatusRuntimeException(status, trailers));
        };
    }

    private final class Service extends GenerationServiceGrpc.GenerationServiceImplBase {
        @Override
        public void generate(GenerateRequest request, StreamObserver<GenerateResponse> responses) {
            requests.add(request);
            Answer answer = answers.get(Math.min(requests.size(), answers.size()) - 1);
            answer.to(request, (ServerCallStreamObserver<GenerateResponse>) responses);
        }
    }

    private static final class Model extends ModelServiceGrpc.ModelServiceImplBase {
        @Override
        public void getModel(GetModelRequest request, StreamObserver<GetModelResponse> response) {
            response.onNext(GetModelResponse.getDefaultInstance());
            response.onCompleted();
        }
    }

    private final class Headers implements ServerInterceptor {
        @Override
        public <Q, R> ServerCall.Listener<Q> interceptCall(
                ServerCall<Q, R> call, Metadata headers, ServerCallHandler<Q, R> next) {
            authorizations.add(String.valueOf(headers.get(AUTHORIZATION)));
            return next.startCall(call, headers);
        }
    }
}
