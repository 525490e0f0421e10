package io.github.hsrpc;

import io.github.hsrpc.v1.Message;

/** Messages of a conversation, by who speaks. {@link Message} itself has more, such as calls of tools. */
public final class Messages {
    private Messages() {}

    /**
     * Tells the model how to behave.
     *
     * @param content what is said
     * @return the message
     */
    public static Message system(String content) {
        return message("system", content).build();
    }

    /**
     * Says what its user says.
     *
     * @param content what is said
     * @return the message
     */
    public static Message user(String content) {
        return message("user", content).build();
    }

    /**
     * Repeats what the model said.
     *
     * @param content what was said
     * @return the message
     */
    public static Message assistant(String content) {
        return message("assistant", content).build();
    }

    /**
     * Gives the result of a call of a tool.
     *
     * @param callId the id that the call had
     * @param content the result
     * @return the message
     */
    public static Message tool(String callId, String content) {
        return message("tool", content).setToolCallId(callId).build();
    }

    private static Message.Builder message(String role, String content) {
        return Message.newBuilder().setRole(role).setContent(content);
    }
}
