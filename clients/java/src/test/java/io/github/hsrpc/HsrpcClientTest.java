package io.github.hsrpc;

import static io.github.hsrpc.FakeServer.fails;
import static io.github.hsrpc.FakeServer.first;
import static io.github.hsrpc.FakeServer.last;
import static io.github.hsrpc.FakeServer.piece;
import static io.github.hsrpc.FakeServer.says;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import io.github.hsrpc.v1.GenerateRequest;
import io.github.hsrpc.v1.GenerationServiceGrpc;
import io.grpc.Metadata;
import io.grpc.Status;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.Timeout;

/** What a client does with its calls: retries, deadlines, tokens, reconnecting. */
public final class HsrpcClientTest {
    @Rule
    public final Timeout timeout = Timeout.seconds(60);

    private static final Metadata.Key<String> PUSHBACK =
            Metadata.Key.of("grpc-retry-pushback-ms", Metadata.ASCII_STRING_MARSHALLER);
    private static final FakeServer.Answer STORY = says(first("Once"), piece(" more"), last());
    /** Says nothing, and never ends. */
    private static final FakeServer.Answer SILENCE = (request, responses) -> {};

    @Test
    public void aRefusedCallIsTriedAgain() throws Exception {
        for (Status refusal : List.of(Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED)) {
            try (FakeServer server = new FakeServer(fails(refusal), STORY);
                    HsrpcClient client = HsrpcClient.create(server.target())) {
                assertEquals("Once more", client.generate("a").complete().text());
                assertEquals(2, server.requests.size());
            }
        }
    }

    @Test
    public void aLargePromptIsTriedAgain() throws Exception {
        String prompt = "a".repeat(3 << 20);
        try (FakeServer server = new FakeServer(fails(Status.UNAVAILABLE), STORY);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            assertEquals("Once more", client.generate(prompt).complete().text());
        }
    }

    @Test
    public void aCallThatWasAnsweredIsNotTriedAgain() throws Exception {
        FakeServer.Answer answer = fails(Status.UNAVAILABLE, new Metadata(), first("Once"));
        try (FakeServer server = new FakeServer(answer, STORY);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            assertEquals(Status.Code.UNAVAILABLE, failure(client.generate("a")).code());
            assertEquals(1, server.requests.size());
        }
    }

    @Test
    public void aWrongCallIsNotTriedAgain() throws Exception {
        try (FakeServer server = new FakeServer(fails(Status.INVALID_ARGUMENT), STORY);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            assertEquals(Status.Code.INVALID_ARGUMENT, failure(client.generate("a")).code());
            assertEquals(1, server.requests.size());
        }
    }

    @Test
    public void theServerSaysWhenToTryAgain() throws Exception {
        try (FakeServer server = new FakeServer(fails(Status.UNAVAILABLE, pushback("800")), STORY);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            long begin = System.nanoTime();
            client.generate("a").complete();
            assertTrue(Duration.ofNanos(System.nanoTime() - begin).toMillis() >= 800);
        }
    }

    @Test
    public void theServerSaysNotToTryAgain() throws Exception {
        try (FakeServer server = new FakeServer(fails(Status.UNAVAILABLE, pushback("-1")), STORY);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            assertEquals(Status.Code.UNAVAILABLE, failure(client.generate("a")).code());
            assertEquals(1, server.requests.size());
        }
    }

    @Test
    public void aServerThatWasAwayIsFoundAtOnce() throws Exception {
        FakeServer server = new FakeServer(STORY);
        try (HsrpcClient client = HsrpcClient.create(server.target())) {
            client.generate("a").complete();
            server.close();
            assertEquals(Status.Code.UNAVAILABLE, failure(client.generate("a")).code());
            try (FakeServer again = new FakeServer(server.port(), STORY)) {
                assertEquals("Once more", client.generate("a").complete().text());
                assertEquals(1, again.requests.size());
            }
        }
    }

    @Test
    public void callsGoToEveryAddressInTurn() throws Exception {
        try (FakeServer one = new FakeServer(STORY);
                FakeServer two = new FakeServer(STORY);
                Addresses addresses = new Addresses(one.port(), two.port());
                HsrpcClient client = HsrpcClient.create(addresses.getDefaultScheme() + ":///")) {
            while (one.requests.isEmpty() || two.requests.isEmpty()) {
                client.generate("a").complete();
            }
        }
    }

    @Test
    public void aServerThatComesLateIsWaitedFor() throws Exception {
        FakeServer gone = new FakeServer(STORY);
        gone.close();
        try (HsrpcClient client = HsrpcClient.create(gone.target())) {
            HsrpcException error =
                    assertThrows(HsrpcException.class, () -> client.waitReady(Duration.ofMillis(300)));
            assertEquals(Status.Code.DEADLINE_EXCEEDED, error.code());
            try (FakeServer late = new FakeServer(gone.port(), STORY)) {
                client.waitReady(Duration.ofMinutes(1));
                assertTrue(late.requests.isEmpty());
            }
        }
    }

    @Test
    public void theDeadlineIsTheOptionsOwnOrElseTheClients() throws Exception {
        GenerateOptions own = GenerateOptions.builder().deadline(Duration.ofMillis(50)).build();
        try (FakeServer server = new FakeServer(SILENCE);
                HsrpcClient patient = HsrpcClient.builder(server.target()).deadline(Duration.ofHours(1)).build();
                HsrpcClient hasty = HsrpcClient.builder(server.target()).deadline(Duration.ofMillis(50)).build()) {
            assertEquals(Status.Code.DEADLINE_EXCEEDED, failure(patient.generate("a", own)).code());
            assertEquals(Status.Code.DEADLINE_EXCEEDED, failure(hasty.generate("a")).code());
        }
    }

    @Test
    public void everyCallBringsTheToken() throws Exception {
        try (FakeServer server = new FakeServer(STORY);
                HsrpcClient client = HsrpcClient.builder(server.target()).token("secret").build()) {
            client.generate("a").complete();
            GenerationServiceGrpc.newBlockingStub(client.channel())
                    .generate(GenerateRequest.getDefaultInstance())
                    .forEachRemaining(response -> {});
            assertEquals(List.of("Bearer secret", "Bearer secret"), server.authorizations);
        }
    }

    @Test
    public void eachKindOfPromptHasItsField() throws Exception {
        GenerateOptions options = GenerateOptions.builder().maxTokens(3).build();
        try (FakeServer server = new FakeServer(STORY);
                HsrpcClient client = HsrpcClient.create(server.target())) {
            client.generate("a", options).complete();
            client.generate(List.of(1, 2), options).complete();
            client.chat(List.of(Messages.system("b"), Messages.user("c")), options).complete();
            GenerateRequest.Builder expected = GenerateRequest.newBuilder();
            expected.getStoppingBuilder().setMaxTokens(3);
            assertEquals(expected.setText("a").build(), server.requests.get(0));
            expected.getTokenIdsBuilder().addIds(1).addIds(2);
            assertEquals(expected.build(), server.requests.get(1));
            expected.getChatBuilder().addMessages(Messages.system("b")).addMessages(Messages.user("c"));
            assertEquals(expected.build(), server.requests.get(2));
        }
    }

    @Test
    public void aSettingThatCannotBeNamesItself() throws Exception {
        HsrpcClient.Builder builder = HsrpcClient.builder("127.0.0.1:1");
        assertNames("token", () -> builder.token("two\nlines"));
        assertNames("token", () -> builder.token(""));
        assertNames("deadline", () -> builder.deadline(Duration.ZERO));
        assertNames("no/such/ca.pem", () -> builder.tlsCa(Path.of("no/such/ca.pem")));
        assertNames("no/such/key.pem", () -> builder.tlsCertificate(Path.of("pom.xml"), Path.of("no/such/key.pem")));
        for (String target : List.of("", "nope://host", "::1:50051", "127.0.0.1:65536")) {
            assertNames('"' + target + '"', () -> HsrpcClient.create(target));
        }
        Path empty = Files.createTempFile("empty", ".pem");
        try {
            assertNames("PEM", () -> HsrpcClient.builder("127.0.0.1:1").tlsCa(empty).build());
        } finally {
            Files.delete(empty);
        }
    }

    private static void assertNames(String word, Runnable code) {
        Exception error = assertThrows(Exception.class, code::run);
        List<Class<?>> kinds = List.of(IllegalArgumentException.class, UncheckedIOException.class);
        assertTrue(error.toString(), kinds.contains(error.getClass()));
        assertTrue(error.getMessage(), error.getMessage().contains(word));
    }

    private static HsrpcException failure(GenerationStream generation) {
        return assertThrows(HsrpcException.class, generation::complete);
    }

    private static Metadata pushback(String milliseconds) {
        Metadata trailers = new Metadata();
        trailers.put(PUSHBACK, milliseconds);
        return trailers;
    }
}
