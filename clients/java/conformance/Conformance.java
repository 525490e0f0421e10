import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.util.JsonFormat;
import io.github.hsrpc.Completion;
import io.github.hsrpc.FieldViolation;
import io.github.hsrpc.GenerateOptions;
import io.github.hsrpc.GenerationStream;
import io.github.hsrpc.HsrpcClient;
import io.github.hsrpc.HsrpcException;
import io.github.hsrpc.v1.Delta;
import io.github.hsrpc.v1.Finish;
import io.github.hsrpc.v1.GenerateRequest;
import io.github.hsrpc.v1.TokenLogprob;
import io.github.hsrpc.v1.TopLogprob;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Collections;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/** Answers the lines of the conformance suite, one JSON object each, with what the client made of them. */
final class Conformance {
    private static final Gson GSON = new GsonBuilder().serializeNulls().disableHtmlEscaping().create();
    private static final int POLL_MILLISECONDS = 20;

    private final JsonObject line;
    private final String call;
    private final GenerateRequest request;
    private final GenerateOptions options;
    private final int cancelAfter;

    private Conformance(JsonObject line) throws InvalidProtocolBufferException {
        this.line = line;
        call = line.get("call").getAsString();
        GenerateRequest.Builder message = GenerateRequest.newBuilder();
        JsonFormat.parser().merge(line.get("request").toString(), message);
        request = message.build();
        options = options();
        cancelAfter = optional("cancel_after").map(JsonElement::getAsInt).orElse(Integer.MAX_VALUE);
    }

    public static void main(String[] arguments) throws Exception {
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        PrintStream answers = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            answers.println(GSON.toJson(new Conformance(JsonParser.parseString(line).getAsJsonObject()).answer()));
        }
    }

    private JsonObject answer() throws IOException, InterruptedException, ExecutionException {
        int streams = optional("streams").map(JsonElement::getAsInt).orElse(1);
        int repeats = optional("repeat").map(JsonElement::getAsInt).orElse(1);
        Optional<Path> pause = optional("pause_file").map(file -> Path.of(file.getAsString()));
        JsonArray results = new JsonArray();
        ExecutorService threads = Executors.newFixedThreadPool(streams);
        try (HsrpcClient client = client()) {
            for (int repeat = 0; repeat < repeats; repeat++) {
                if (repeat > 0 && pause.isPresent()) {
                    waitFor(pause.get());
                }
                Callable<JsonObject> one = () -> result(client);
                for (Future<JsonObject> result : threads.invokeAll(Collections.nCopies(streams, one))) {
                    results.add(result.get());
                }
            }
        } finally {
            threads.shutdown();
        }
        JsonObject answer = new JsonObject();
        answer.add("id", line.get("id"));
        answer.add("results", results);
        return answer;
    }

    private HsrpcClient client() {
        HsrpcClient.Builder builder = HsrpcClient.builder(line.get("target").getAsString());
        optional("token").ifPresent(token -> builder.token(token.getAsString()));
        optional("tls").map(JsonElement::getAsJsonObject).ifPresent(tls -> {
            file(tls, "ca").ifPresentOrElse(builder::tlsCa, builder::tls);
            file(tls, "cert").ifPresent(cert -> builder.tlsCertificate(cert, file(tls, "key").orElseThrow()));
        });
        return builder.build();
    }

    private GenerateOptions options() {
        GenerateOptions.Builder builder = GenerateOptions.builder().from(request);
        optional("deadline_s").ifPresent(seconds -> builder.deadline(duration(seconds.getAsDouble())));
        return builder.build();
    }

    private GenerationStream start(HsrpcClient client) {
        switch (request.getInputCase()) {
            case TEXT:
                return client.generate(request.getText(), options);
            case TOKEN_IDS:
                return client.generate(request.getTokenIds().getIdsList(), options);
            case CHAT:
                return client.chat(request.getChat(), options);
            default:
                return client.generate(request);
        }
    }

    private JsonObject result(HsrpcClient client) {
        Result result = new Result();
        try (GenerationStream generation = start(client)) {
            if (call.equals("text") || call.equals("chat_text")) {
                result.whole(generation.complete());
            } else {
                stream(generation, result);
            }
        } catch (HsrpcException error) {
            result.failed(error);
        }
        return result.json();
    }

    private void stream(GenerationStream generation, Result result) {
        for (Delta delta : generation) {
            result.delta(delta);
            if (result.deltas >= cancelAfter) {
                result.cancelled();
                return;
            }
        }
        result.finished(generation.finish().orElseThrow());
    }

    private Optional<JsonElement> optional(String name) {
        return Conformance.optional(line, name);
    }

    private static Optional<JsonElement> optional(JsonObject object, String name) {
        return Optional.ofNullable(object.get(name)).filter(value -> !value.isJsonNull());
    }

    private static Optional<Path> file(JsonObject tls, String name) {
        return optional(tls, name).map(file -> Path.of(file.getAsString()));
    }

    private static Duration duration(double seconds) {
        return Duration.ofNanos(Math.round(seconds * 1e9));
    }

    private static double seconds(Duration time) {
        return time.toNanos() / 1e9;
    }

    /** Tells the runner that this waits, and waits until it may go on. */
    private static void waitFor(Path file) throws IOException, InterruptedException {
        Files.createFile(Path.of(file + ".waiting"));
        while (!Files.exists(file)) {
            Thread.sleep(POLL_MILLISECONDS);
        }
    }

    /** What one call gave. */
    private static final class Result {
        private final StringBuilder text = new StringBuilder();
        private final JsonArray tokenIds = new JsonArray();
        private final JsonArray logprobs = new JsonArray();
        private int deltas;
        private boolean cancelled;
        private Optional<Finish> finish = Optional.empty();
        private JsonElement error = JsonNull.INSTANCE;

        void delta(Delta delta) {
            if (!delta.getText().isEmpty() || delta.getTokenIdsCount() > 0) {
                deltas++;
            }
            output(delta.getText(), delta.getTokenIdsList(), delta.getLogprobsList());
        }

        void whole(Completion completion) {
            output(completion.text(), completion.tokenIds(), completion.logprobs());
            finished(completion.finish());
        }

        void finished(Finish message) {
            finish = Optional.of(message);
        }

        void cancelled() {
            cancelled = true;
        }

        void failed(HsrpcException exception) {
            JsonArray fields = new JsonArray();
            for (FieldViolation violation : exception.fieldViolations()) {
                JsonObject field = new JsonObject();
                field.addProperty("field", violation.field());
                field.addProperty("description", violation.description());
                fields.add(field);
            }
            JsonObject object = new JsonObject();
            object.addProperty("code", exception.code().name());
            object.addProperty("message", exception.getMessage());
            object.add("fields", fields);
            object.addProperty("retry_delay_s", exception.retryDelay().map(Conformance::seconds).orElse(null));
            object.addProperty("reason", exception.reason().orElse(null));
            object.addProperty("domain", exception.domain().orElse(null));
            object.add("metadata", GSON.toJsonTree(exception.metadata()));
            error = object;
        }

        JsonObject json() {
            JsonObject object = new JsonObject();
            object.addProperty("text", text.toString());
            object.addProperty("deltas", deltas);
            object.add("token_ids", tokenIds);
            object.add("logprobs", logprobs);
            object.addProperty("prompt_tokens", finish.map(end -> end.getUsage().getPromptTokens()).orElse(0));
            object.addProperty("completion_tokens", finish.map(end -> end.getUsage().getCompletionTokens()).orElse(0));
            object.addProperty("finish_reason", finish.map(end -> end.getReason().name()).orElse(null));
            object.addProperty(
                    "stop_string", finish.filter(Finish::hasStopString).map(Finish::getStopString).orElse(null));
            object.addProperty("cancelled", cancelled);
            object.add("error", error);
            return object;
        }

        private void output(String more, List<Integer> ids, List<TokenLogprob> probabilities) {
            text.append(more);
            ids.forEach(tokenIds::add);
            probabilities.forEach(logprob -> logprobs.add(json(logprob)));
        }

        private static JsonObject json(TokenLogprob logprob) {
            JsonArray top = new JsonArray();
            for (TopLogprob item : logprob.getTopList()) {
                top.add(json(item.getTokenId(), item.getLogprob()));
            }
            JsonObject object = json(logprob.getTokenId(), logprob.getLogprob());
            object.addProperty("rank", logprob.getRank());
            object.add("top", top);
            return object;
        }

        private static JsonObject json(int tokenId, double logprob) {
            JsonObject object = new JsonObject();
            object.addProperty("token_id", tokenId);
            object.addProperty("logprob", logprob);
            return object;
        }
    }
}
