import io.github.hsrpc.GenerateOptions;
import io.github.hsrpc.GenerationStream;
import io.github.hsrpc.HsrpcClient;
import io.github.hsrpc.HsrpcException;
import io.github.hsrpc.Messages;
import io.github.hsrpc.v1.Delta;
import io.github.hsrpc.v1.Usage;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Optional;

/**
 * Prints the answer to a prompt as it comes: {@code example [HOST:PORT [PROMPT]]}. A token and the file of the roots
 * that the server's certificate must come from are taken from {@code HSRPC_TOKEN} and {@code HSRPC_TLS_CA}.
 */
final class Example {
    private static final GenerateOptions OPTIONS =
            GenerateOptions.builder().maxTokens(128).temperature(0.8).deadline(Duration.ofMinutes(1)).build();

    public static void main(String[] arguments) {
        String target = arguments.length > 0 ? arguments[0] : "localhost:50051";
        String prompt = arguments.length > 1 ? arguments[1] : "Tell me a story.";
        HsrpcClient.Builder builder = HsrpcClient.builder(target);
        Optional.ofNullable(System.getenv("HSRPC_TOKEN")).ifPresent(builder::token);
        Optional.ofNullable(System.getenv("HSRPC_TLS_CA")).map(Path::of).ifPresent(builder::tlsCa);
        try (HsrpcClient client = builder.build();
                GenerationStream answer = start(client, prompt)) {
            for (Delta delta : answer) {
                System.out.print(delta.getText());
                System.out.flush();
            }
            Usage usage = answer.finish().orElseThrow().getUsage();
            System.out.printf(
                    "%n%d tokens of prompt, %d of output%n", usage.getPromptTokens(), usage.getCompletionTokens());
        } catch (HsrpcException error) {
            System.err.println(error.getMessage());
            System.exit(1);
        }
    }

    /** A model that was trained on conversations expects one. */
    private static GenerationStream start(HsrpcClient client, String prompt) {
        if (client.getModel().getHasChatTemplate()) {
            return client.chat(List.of(Messages.user(prompt)), OPTIONS);
        }
        return client.generate(prompt, OPTIONS);
    }
}
