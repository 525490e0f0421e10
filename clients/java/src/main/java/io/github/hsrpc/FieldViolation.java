package io.github.hsrpc;

import java.io.Serializable;

/** A field of a request that is wrong. */
public final class FieldViolation implements Serializable {
    private static final long serialVersionUID = 1;

    private final String field;
    private final String description;

    FieldViolation(String field, String description) {
        this.field = field;
        this.description = description;
    }

    /**
     * Names the field.
     *
     * @return its path in the request, such as {@code sampling.temperature}
     */
    public String field() {
        return field;
    }

    /**
     * Says what is wrong with it.
     *
     * @return the value, and a remedy
     */
    public String description() {
        return description;
    }

    @Override
    public String toString() {
        return field + ": " + description;
    }
}
