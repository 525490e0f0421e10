package io.github.hsrpc;

import static io.github.hsrpc.FakeServer.first;
import static io.github.hsrpc.FakeServer.last;
import static io.github.hsrpc.FakeServer.piece;
import static io.github.hsrpc.FakeServer.says;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import io.github.hsrpc.v1.Delta;
import io.github.hsrpc.v1.FinishReason;
import io.grpc.Status;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.Timeout;

/** What a generation does with the responses to it. */
public final class GenerationStreamTest {
    @Rule
    public final Timeout timeout = Timeout.seconds(60);

    private static final int PIECE_LENGTH = 1 << 16;
    private static final int PIECES = 2000;
    /** Netty's windows end at 8 MiB, and the server counts a piece when it hands it over. */
    private static final int MOST_PIECES_AHEAD = 200;

    @Test
    public void theFactsComeWithTheOutput() throws Exception {
        try (FakeServer server = new FakeServer(says(first("Once"), last()));
                HsrpcClient client = HsrpcClient.create(server.target());
                GenerationStream generation = client.generate("a")) {
            assertTrue(generation.start().isEmpty());
            Iterator<Delta> deltas = generation.iterator();
            assertEquals("Once", deltas.next().getText());
            assertEquals("one", generation.start().orElseThrow().getRequestId());
            assertTrue(generation.finish().isEmpty());
            assertFalse(deltas.hasNext());
            assertEquals(FinishReason.FINISH_REASON_EOS, generation.finish().orElseThrow().getReason());
            assertThrows(NoSuchElementException.class, deltas::next);
            assertThrows(IllegalStateException.class, generation::iterator);
        }
    }

    @Test
    public void aStreamWithoutAnEndIsAFailure() throws Exception {
        try (FakeServer server = new FakeServer(says(first("Once")));
                HsrpcClient client = HsrpcClient.create(server.target())) {
            HsrpcException error = assertThrows(HsrpcException.class, client.generate("a")::complete);
            assertEquals(Status.Code.DATA_LOSS, error.code());
        }
    }

    @Test
    public void leavingEarlyCancelsTheCall() throws Exception {
        CountDownLatch cancelled = new CountDownLatch(1);
        FakeServer.Answer answer = (request, responses) -> {
            responses.setOnCancelHandler(cancelled::countDown);
            responses.onNext(first("Once"));
        };
        try (FakeServer server = new FakeServer(answer);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            try (GenerationStream generation = client.generate("a")) {
                generation.iterator().next();
            }
            assertTrue(cancelled.await(10, TimeUnit.SECONDS));
        }
    }

    @Test
    public void closingEndsTheWaitOfAnotherThread() throws Exception {
        try (FakeServer server = new FakeServer((request, responses) -> {});
                HsrpcClient client = HsrpcClient.create(server.target())) {
            GenerationStream generation = client.generate("a");
            Thread closing = new Thread(generation::close);
            closing.start();
            HsrpcException error = assertThrows(HsrpcException.class, generation::complete);
            assertEquals(Status.Code.CANCELLED, error.code());
            closing.join();
        }
    }

    @Test
    public void aSlowReaderHoldsLittle() throws Exception {
        AtomicInteger sent = new AtomicInteger();
        FakeServer.Answer answer = (request, responses) -> responses.setOnReadyHandler(() -> {
            while (responses.isReady() && sent.get() < PIECES) {
                String text = "a".repeat(PIECE_LENGTH);
                responses.onNext(sent.getAndIncrement() == 0 ? first(text) : piece(text));
                if (sent.get() == PIECES) {
                    responses.onNext(last());
                    responses.onCompleted();
                }
            }
        });
        try (FakeServer server = new FakeServer(answer);
                HsrpcClient client = HsrpcClient.create(server.target());
                GenerationStream generation = client.generate("a")) {
            int read = 0;
            for (Delta delta : generation) {
                read++;
                assertEquals(PIECE_LENGTH, delta.getText().length());
                if (read == 1) {
                    awaitStandstill(sent);
                }
                assertTrue(sent + " sent, " + read + " read", sent.get() - read <= MOST_PIECES_AHEAD);
            }
            assertEquals(PIECES, read);
        }
    }

    /** Returns once nothing has been counted for a while. */
    private static void awaitStandstill(AtomicInteger count) throws InterruptedException {
        int before;
        do {
            before = count.get();
            Thread.sleep(300);
        } while (count.get() != before);
    }
}
