package io.github.hsrpc;

import io.github.hsrpc.v1.Finish;
import io.github.hsrpc.v1.FinishReason;
import io.github.hsrpc.v1.Start;
import io.github.hsrpc.v1.TokenLogprob;
import io.github.hsrpc.v1.Usage;
import java.util.List;

/** The whole output of a request. */
public final class Completion {
    private final Start start;
    private final String text;
    private final List<Integer> tokenIds;
    private final List<TokenLogprob> logprobs;
    private final List<TokenLogprob> promptLogprobs;
    private final Finish finish;

    Completion(
            Start start,
            String text,
            List<Integer> tokenIds,
            List<TokenLogprob> logprobs,
            List<TokenLogprob> promptLogprobs,
            Finish finish) {
        this.start = start;
        this.text = text;
        this.tokenIds = List.copyOf(tokenIds);
        this.logprobs = List.copyOf(logprobs);
        this.promptLogprobs = List.copyOf(promptLogprobs);
        this.finish = finish;
    }

    /**
     * Gives the facts about the prompt.
     *
     * @return the request's id, and the settings in effect
     */
    public Start start() {
        return start;
    }

    /**
     * Gives the text of the output.
     *
     * @return all of it
     */
    public String text() {
        return text;
    }

    /**
     * Gives the tokens of the output.
     *
     * @return their ids; empty without {@link GenerateOptions.Builder#returnTokenIds}
     */
    public List<Integer> tokenIds() {
        return tokenIds;
    }

    /**
     * Gives the probabilities of the output's tokens.
     *
     * @return one for each token; empty without {@link GenerateOptions.Builder#logprobs}
     */
    public List<TokenLogprob> logprobs() {
        return logprobs;
    }

    /**
     * Gives the probabilities of the prompt's tokens.
     *
     * @return one for each token but the first; empty without {@link GenerateOptions.Builder#promptLogprobs}
     */
    public List<TokenLogprob> promptLogprobs() {
        return promptLogprobs;
    }

    /**
     * Tells how the request ended.
     *
     * @return the reason, what matched, and where the time went
     */
    public Finish finish() {
        return finish;
    }

    /**
     * Tells why the output ended.
     *
     * @return the reason of {@link #finish}
     */
    public FinishReason finishReason() {
        return finish.getReason();
    }

    /**
     * Counts the tokens.
     *
     * @return the usage of {@link #finish}
     */
    public Usage usage() {
        return finish.getUsage();
    }

    @Override
    public String toString() {
        return text;
    }
}
