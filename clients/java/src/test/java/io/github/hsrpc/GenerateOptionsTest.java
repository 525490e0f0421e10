package io.github.hsrpc;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;

import com.google.protobuf.Descriptors.FieldDescriptor;
import io.github.hsrpc.v1.Constraint;
import io.github.hsrpc.v1.GenerateRequest;
import io.github.hsrpc.v1.Output;
import io.github.hsrpc.v1.Sampling;
import io.github.hsrpc.v1.Stopping;
import io.github.hsrpc.v1.TextOptions;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.time.Duration;
import java.util.Arrays;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.Test;

/** That options reach the request. */
public final class GenerateOptionsTest {
    /** Prompts, which are arguments of the calls; messages, whose fields have methods. */
    private static final Set<String> OTHERS = Set.of(
            "text", "tokenIds", "chat", "sampling", "stopping", "output", "textOptions");
    private static final Map<Class<?>, Object> VALUES = Map.of(
            int.class, 1,
            long.class, 1L,
            double.class, 1.0,
            boolean.class, true,
            String.class, "a",
            Duration.class, Duration.ofMillis(1500),
            Map.class, Map.of(1, 2.0),
            int[].class, new int[] {1},
            String[].class, new String[] {"a"},
            Constraint.class, Constraint.newBuilder().setRegex("a").build());

    @Test
    public void everySettingHasAMethodThatSetsItAlone() throws Exception {
        Set<String> set = new TreeSet<>();
        for (Method method : GenerateOptions.Builder.class.getDeclaredMethods()) {
            if (fields().contains(method.getName())) {
                set.addAll(fieldsSetBy(method));
                assertEquals(Set.of(method.getName()), fieldsSetBy(method));
            }
        }
        assertEquals(fields(), set);
    }

    @Test
    public void aSchemaIsAConstraint() {
        GenerateRequest request = GenerateOptions.builder().jsonSchema("{}").build().request().build();
        assertEquals("{}", request.getConstraint().getJsonSchema());
    }

    @Test
    public void timesKeepTheirFractions() {
        GenerateRequest request =
                GenerateOptions.builder().timeLimit(Duration.ofMillis(1500)).build().request().build();
        assertEquals(1, request.getStopping().getTimeLimit().getSeconds());
        assertEquals(500_000_000, request.getStopping().getTimeLimit().getNanos());
    }

    @Test
    public void optionsDoNotChangeWithABuilderMadeOfThem() {
        GenerateOptions options = GenerateOptions.builder().maxTokens(1).deadline(Duration.ofSeconds(1)).build();
        GenerateOptions others = options.toBuilder().maxTokens(2).build();
        assertEquals(1, options.request().getStopping().getMaxTokens());
        assertEquals(2, others.request().getStopping().getMaxTokens());
        assertEquals(options.deadline(), others.deadline());
        assertThrows(IllegalArgumentException.class, () -> options.toBuilder().deadline(Duration.ofSeconds(-1)));
    }

    private static Set<String> fields() {
        return Stream.of(
                        GenerateRequest.getDescriptor(),
                        Sampling.getDescriptor(),
                        Stopping.getDescriptor(),
                        Output.getDescriptor(),
                        TextOptions.getDescriptor())
                .flatMap(message -> message.getFields().stream())
                .map(FieldDescriptor::getJsonName)
                .filter(name -> !OTHERS.contains(name))
                .collect(Collectors.toCollection(TreeSet::new));
    }

    private static Set<String> fieldsSetBy(Method method) throws IllegalAccessException, InvocationTargetException {
        GenerateOptions.Builder builder = GenerateOptions.builder();
        method.invoke(builder, Arrays.stream(method.getParameterTypes()).map(VALUES::get).toArray());
        GenerateRequest request = builder.build().request().build();
        return Stream.of(
                        request,
                        request.getSampling(),
                        request.getStopping(),
                        request.getOutput(),
                        request.getTextOptions())
                .flatMap(message -> message.getAllFields().keySet().stream())
                .map(FieldDescriptor::getJsonName)
                .filter(name -> !OTHERS.contains(name))
                .collect(Collectors.toSet());
    }
}
