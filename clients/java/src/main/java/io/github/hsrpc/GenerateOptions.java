package io.github.hsrpc;

import io.github.hsrpc.v1.Constraint;
import io.github.hsrpc.v1.GenerateRequest;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.stream.Collectors;
import java.util.stream.IntStream;

/**
 * How to continue a prompt. What is not set takes the server's or the model's default, which {@link
 * GenerationStream#start} tells; what is wrong comes back as an {@link HsrpcException} that names the field. Immutable.
 */
public final class GenerateOptions {
    private static final GenerateOptions DEFAULTS = builder().build();

    private final GenerateRequest settings;
    private final Optional<Duration> deadline;

    private GenerateOptions(GenerateRequest settings, Optional<Duration> deadline) {
        this.settings = settings;
        this.deadline = deadline;
    }

    /**
     * Gives options of which none is set.
     *
     * @return the options
     */
    public static GenerateOptions defaults() {
        return DEFAULTS;
    }

    /**
     * Begins options of which none is set.
     *
     * @return a builder
     */
    public static Builder builder() {
        return new Builder(GenerateRequest.newBuilder(), Optional.empty());
    }

    /**
     * Begins options that differ from these.
     *
     * @return a builder with what is set here
     */
    public Builder toBuilder() {
        return new Builder(request(), deadline);
    }

    /** A request that lacks but the prompt. */
    GenerateRequest.Builder request() {
        return settings.toBuilder();
    }

    Optional<Duration> deadline() {
        return deadline;
    }

    static Duration checkDeadline(Duration time) {
        if (time.isNegative() || time.isZero()) {
            throw new IllegalArgumentException("deadline: " + time + " is no time to wait; give more than zero");
        }
        return time;
    }

    /** Options in the making. A setting replaces the one before; of lists and maps it adds to it. */
    public static final class Builder {
        private final GenerateRequest.Builder settings;
        private Optional<Duration> deadline;

        private Builder(GenerateRequest.Builder settings, Optional<Duration> deadline) {
            this.settings = settings;
            this.deadline = deadline;
        }

        /**
         * Sets how long the call may take as a whole; it then fails with {@code DEADLINE_EXCEEDED}. Default: the
         * client's own.
         *
         * @param time more than zero
         * @return this builder
         * @throws IllegalArgumentException if the time is not more than zero
         */
        public Builder deadline(Duration time) {
            deadline = Optional.of(checkDeadline(time));
            return this;
        }

        /**
         * Takes what is set in a request, such as a setting that has no method here.
         *
         * @param request settings; a prompt in it gives way to that of the call
         * @return this builder
         */
        public Builder from(GenerateRequest request) {
            settings.mergeFrom(request);
            return this;
        }

        /**
         * Names the request, for {@link HsrpcClient#abort} and for logs. Default: the server makes a name.
         *
         * @param id 1 to 128 of {@code A-Z a-z 0-9 . _ : -}
         * @return this builder
         */
        public Builder requestId(String id) {
            settings.setRequestId(id);
            return this;
        }

        /**
         * Names the model that must answer. Default: the one that is loaded.
         *
         * @param name as {@link HsrpcClient#getModel} gives it
         * @return this builder
         */
        public Builder model(String name) {
            settings.setModel(name);
            return this;
        }

        /**
         * Sets how urgent the request is among those that wait. Default 0.
         *
         * @param value smaller is let in first
         * @return this builder
         */
        public Builder priority(int value) {
            settings.setPriority(value);
            return this;
        }

        /**
         * Shares what the server keeps of equal first tokens only with requests of the same salt. Default: none.
         *
         * @param salt a secret of those who may share, of at most 256 bytes
         * @return this builder
         */
        public Builder cacheSalt(String salt) {
            settings.setCacheSalt(salt);
            return this;
        }

        /**
         * Lets the output be nothing but JSON of a schema; {@link #constraint} has regular expressions, grammars and
         * choices as well. Default: the output may be anything.
         *
         * @param schema a JSON Schema
         * @return this builder
         */
        public Builder jsonSchema(String schema) {
            return constraint(Constraint.newBuilder().setJsonSchema(schema).build());
        }

        /**
         * Lets the output be nothing but what a constraint allows. Default: it may be anything.
         *
         * @param constraint a JSON Schema, any JSON object, a regular expression, a grammar, or a choice of texts
         * @return this builder
         */
        public Builder constraint(Constraint constraint) {
            settings.setConstraint(constraint);
            return this;
        }

        /**
         * Lets the tokenizer add its special tokens to a text. Default true.
         *
         * @param add whether it does
         * @return this builder
         */
        public Builder addSpecialTokens(boolean add) {
            settings.getTextOptionsBuilder().setAddSpecialTokens(add);
            return this;
        }

        /**
         * Makes tokens of the text of special tokens in a prompt. Default true.
         *
         * @param parse false for the words of people you do not trust
         * @return this builder
         */
        public Builder parseSpecial(boolean parse) {
            settings.getTextOptionsBuilder().setParseSpecial(parse);
            return this;
        }

        /**
         * Sets the temperature. Default: the model's own, else 1.
         *
         * @param value in [0, 100]; 0 is greedy
         * @return this builder
         */
        public Builder temperature(double value) {
            settings.getSamplingBuilder().setTemperature(value);
            return this;
        }

        /**
         * Draws from the most probable tokens that together have this probability. Default: the model's own, else 1.
         *
         * @param share in (0, 1]
         * @return this builder
         */
        public Builder topP(double share) {
            settings.getSamplingBuilder().setTopP(share);
            return this;
        }

        /**
         * Draws from so many of the most probable tokens. Default: the model's own, else all.
         *
         * @param count 0 is all
         * @return this builder
         */
        public Builder topK(int count) {
            settings.getSamplingBuilder().setTopK(count);
            return this;
        }

        /**
         * Leaves out tokens that are less probable, relative to the most probable. Default: the model's own, else 0.
         *
         * @param share in [0, 1]
         * @return this builder
         */
        public Builder minP(double share) {
            settings.getSamplingBuilder().setMinP(share);
            return this;
        }

        /**
         * Divides the logits of tokens in prompt and output. Default: the model's own, else 1.
         *
         * @param divisor in (0, 100]
         * @return this builder
         */
        public Builder repetitionPenalty(double divisor) {
            settings.getSamplingBuilder().setRepetitionPenalty(divisor);
            return this;
        }

        /**
         * Subtracts once from the logits of tokens in the output. Default 0.
         *
         * @param penalty in [-2, 2]
         * @return this builder
         */
        public Builder presencePenalty(double penalty) {
            settings.getSamplingBuilder().setPresencePenalty(penalty);
            return this;
        }

        /**
         * Subtracts from the logits of tokens for each time they are in the output. Default 0.
         *
         * @param penalty in [-2, 2]
         * @return this builder
         */
        public Builder frequencyPenalty(double penalty) {
            settings.getSamplingBuilder().setFrequencyPenalty(penalty);
            return this;
        }

        /**
         * Seeds the draws: same seed, same tokens. Default: the server draws one, and {@link GenerationStream#start}
         * has it.
         *
         * @param value not negative
         * @return this builder
         */
        public Builder seed(long value) {
            settings.getSamplingBuilder().setSeed(value);
            return this;
        }

        /**
         * Adds to the logits of tokens. Default: none.
         *
         * @param biases in [-100, 100], by token id
         * @return this builder
         */
        public Builder logitBias(Map<Integer, Double> biases) {
            settings.getSamplingBuilder().putAllLogitBias(biases);
            return this;
        }

        /**
         * Ends the output after so many tokens. Default: as many as the context has room for.
         *
         * @param count at least 1
         * @return this builder
         */
        public Builder maxTokens(int count) {
            settings.getStoppingBuilder().setMaxTokens(count);
            return this;
        }

        /**
         * Excludes end tokens before so many tokens. Default 0.
         *
         * @param count not negative
         * @return this builder
         */
        public Builder minTokens(int count) {
            settings.getStoppingBuilder().setMinTokens(count);
            return this;
        }

        /**
         * Ends the output before the first of these strings. Default: none.
         *
         * @param strings at most 16, of 1 to 256 characters each
         * @return this builder
         */
        public Builder stop(String... strings) {
            settings.getStoppingBuilder().addAllStop(List.of(strings));
            return this;
        }

        /**
         * Ends the output at the first of these tokens. Default: none.
         *
         * @param ids at most 256
         * @return this builder
         */
        public Builder stopTokenIds(int... ids) {
            settings.getStoppingBuilder().addAllStopTokenIds(boxed(ids));
            return this;
        }

        /**
         * Goes on past the tokens that end a text. Default false.
         *
         * @param ignore whether it does
         * @return this builder
         */
        public Builder ignoreEos(boolean ignore) {
            settings.getStoppingBuilder().setIgnoreEos(ignore);
            return this;
        }

        /**
         * Leaves in the text what ended it. Default false.
         *
         * @param include whether it does
         * @return this builder
         */
        public Builder includeStop(boolean include) {
            settings.getStoppingBuilder().setIncludeStop(include);
            return this;
        }

        /**
         * Ends the output, well, with what there is by then. Default: no limit.
         *
         * @param time at most a day
         * @return this builder
         */
        public Builder timeLimit(Duration time) {
            settings.getStoppingBuilder().setTimeLimit(message(time));
            return this;
        }

        /**
         * Asks for the logprobs of the chosen tokens, and of the most probable ones. Default: no logprobs.
         *
         * @param count most probable ones, 0 to 20
         * @return this builder
         */
        public Builder logprobs(int count) {
            settings.getOutputBuilder().setLogprobs(count);
            return this;
        }

        /**
         * Asks for the logprobs of the prompt's tokens but the first, and of the most probable ones in their places. With
         * it {@link #maxTokens} may be 0: the prompt is scored, and nothing generated. Default: none of the prompt.
         *
         * @param count most probable ones, 0 to 20
         * @return this builder
         */
        public Builder promptLogprobs(int count) {
            settings.getOutputBuilder().setPromptLogprobs(count);
            return this;
        }

        /**
         * Begins the text with the prompt's. Default false.
         *
         * @param echo whether it does
         * @return this builder
         */
        public Builder echoPrompt(boolean echo) {
            settings.getOutputBuilder().setEchoPrompt(echo);
            return this;
        }

        /**
         * Asks for token ids beside the text. Default false.
         *
         * @param ids whether they come
         * @return this builder
         */
        public Builder returnTokenIds(boolean ids) {
            settings.getOutputBuilder().setReturnTokenIds(ids);
            return this;
        }

        /**
         * Bounds the tokens of one delta. Default: the server's own.
         *
         * @param count at least 1
         * @return this builder
         */
        public Builder maxTokensPerMessage(int count) {
            settings.getOutputBuilder().setMaxTokensPerMessage(count);
            return this;
        }

        /**
         * Lets tokens wait for others, so that fewer messages come. Default: the server's own.
         *
         * @param time at most a minute
         * @return this builder
         */
        public Builder maxMessageDelay(Duration time) {
            settings.getOutputBuilder().setMaxMessageDelay(message(time));
            return this;
        }

        /**
         * Leaves special tokens out of the text; false shows them, such as those of calls of tools. Default true.
         *
         * @param skip whether it does
         * @return this builder
         */
        public Builder skipSpecialTokens(boolean skip) {
            settings.getOutputBuilder().setSkipSpecialTokens(skip);
            return this;
        }

        /**
         * Makes the options.
         *
         * @return what is set so far
         */
        public GenerateOptions build() {
            return new GenerateOptions(settings.build(), deadline);
        }

        private static List<Integer> boxed(int... ids) {
            return IntStream.of(ids).boxed().collect(Collectors.toUnmodifiableList());
        }

        private static com.google.protobuf.Duration message(Duration time) {
            return com.google.protobuf.Duration.newBuilder()
                    .setSeconds(time.getSeconds())
                    .setNanos(time.getNano())
                    .build();
        }
    }
}
