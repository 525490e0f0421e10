package io.github.hsrpc;

import io.github.hsrpc.v1.Delta;
import io.github.hsrpc.v1.Finish;
import io.github.hsrpc.v1.GenerateRequest;
import io.github.hsrpc.v1.GenerateResponse;
import io.github.hsrpc.v1.GenerationServiceGrpc.GenerationServiceBlockingStub;
import io.github.hsrpc.v1.Start;
import io.github.hsrpc.v1.TokenLogprob;
import io.grpc.Context;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.Optional;

/**
 * The output of one request as it comes. A loop that is left early must be followed by {@link #close}, best by
 * {@code try}, or the server goes on; read to its end, or having failed, it is closed.
 *
 * <p>A message is asked of the server once the one before it has been taken: who reads slowly holds little, and slows
 * the server down, which gives up on a reader that stalls.
 *
 * <p>Belongs to one thread at a time, but for {@link #close}, which any thread may call to end the wait of another.
 */
public final class GenerationStream implements Iterable<Delta>, AutoCloseable {
    private final Context.CancellableContext context = Context.current().withCancellation();
    private final Iterator<GenerateResponse> responses;
    private boolean iterated;
    private Optional<Start> start = Optional.empty();
    private Optional<Finish> finish = Optional.empty();

    GenerationStream(GenerationServiceBlockingStub stub, GenerateRequest request) {
        Context previous = context.attach();
        try {
            responses = stub.generate(request);
        } finally {
            context.detach(previous);
        }
    }

    /**
     * Iterates over the output, once. Its methods wait, and throw {@link HsrpcException} if the call fails.
     *
     * @return pieces of output; their texts, one after the other, are all of it
     * @throws IllegalStateException if this is not the first iterator
     */
    @Override
    public Iterator<Delta> iterator() {
        if (iterated) {
            throw new IllegalStateException("a generation is iterated over once; keep what it gives");
        }
        iterated = true;
        return new Deltas();
    }

    /**
     * Reads the output to its end.
     *
     * @return all of it
     * @throws HsrpcException if the call fails
     * @throws IllegalStateException if it is being iterated over
     */
    public Completion complete() {
        StringBuilder text = new StringBuilder();
        List<Integer> tokenIds = new ArrayList<>();
        List<TokenLogprob> logprobs = new ArrayList<>();
        List<TokenLogprob> promptLogprobs = new ArrayList<>();
        for (Delta delta : this) {
            text.append(delta.getText());
            tokenIds.addAll(delta.getTokenIdsList());
            logprobs.addAll(delta.getLogprobsList());
            promptLogprobs.addAll(delta.getPromptLogprobsList());
        }
        return new Completion(
                start.orElseThrow(), text.toString(), tokenIds, logprobs, promptLogprobs, finish.orElseThrow());
    }

    /**
     * Gives the facts about the prompt.
     *
     * @return the request's id, and the settings in effect; there from the first piece of output on
     */
    public Optional<Start> start() {
        return start;
    }

    /**
     * Tells how the request ended.
     *
     * @return the reason, and the usage; there once the output was read to its end
     */
    public Optional<Finish> finish() {
        return finish;
    }

    /** Cancels the call, if it has not ended: the server stops the work, and who reads gets {@code CANCELLED}. */
    @Override
    public void close() {
        context.cancel(null);
    }

    /** The next response; none after the last. */
    private Optional<GenerateResponse> next() {
        try {
            if (responses.hasNext()) {
                return Optional.of(responses.next());
            }
        } catch (StatusRuntimeException error) {
            close();
            throw HsrpcException.of(error);
        }
        close();
        if (start.isEmpty() || finish.isEmpty()) {
            throw HsrpcException.of(Status.DATA_LOSS
                    .withDescription("the stream ended before its last response")
                    .asRuntimeException());
        }
        return Optional.empty();
    }

    private final class Deltas implements Iterator<Delta> {
        /** Absent: not read yet, or at the end. */
        private Optional<Delta> delta = Optional.empty();

        @Override
        public boolean hasNext() {
            while (delta.isEmpty()) {
                Optional<GenerateResponse> response = GenerationStream.this.next();
                if (response.isEmpty()) {
                    return false;
                }
                take(response.get());
            }
            return true;
        }

        @Override
        public Delta next() {
            if (!hasNext()) {
                throw new NoSuchElementException("the output has ended");
            }
            Delta taken = delta.orElseThrow();
            delta = Optional.empty();
            return taken;
        }

        private void take(GenerateResponse response) {
            if (response.hasStart()) {
                start = Optional.of(response.getStart());
            }
            if (response.hasFinish()) {
                finish = Optional.of(response.getFinish());
            }
            if (response.hasDelta()) {
                delta = Optional.of(response.getDelta());
            }
        }
    }
}
