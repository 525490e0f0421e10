package io.github.hsrpc;

import io.grpc.EquivalentAddressGroup;
import io.grpc.NameResolver;
import io.grpc.NameResolverProvider;
import io.grpc.NameResolverRegistry;
import java.net.InetSocketAddress;
import java.net.URI;
import java.util.List;
import java.util.stream.Collectors;
import java.util.stream.IntStream;

/** A name, {@code several:///}, that stands for ports of this machine until it is closed. */
final class Addresses extends NameResolverProvider implements AutoCloseable {
    private static final String SCHEME = "several";

    private final List<EquivalentAddressGroup> addresses;

    Addresses(int... ports) {
        addresses = IntStream.of(ports)
                .mapToObj(port -> new EquivalentAddressGroup(new InetSocketAddress("127.0.0.1", port)))
                .collect(Collectors.toUnmodifiableList());
        NameResolverRegistry.getDefaultRegistry().register(this);
    }

    @Override
    public void close() {
        NameResolverRegistry.getDefaultRegistry().deregister(this);
    }

    @Override
    public NameResolver newNameResolver(URI target, NameResolver.Args arguments) {
        return new NameResolver() {
            @Override
            public void start(Listener2 listener) {
                listener.onResult(ResolutionResult.newBuilder().setAddresses(addresses).build());
            }

            @Override
            public String getServiceAuthority() {
                return SCHEME;
            }

            @Override
            public void shutdown() {}
        };
    }

    @Override
    public String getDefaultScheme() {
        return SCHEME;
    }

    @Override
    protected boolean isAvailable() {
        return true;
    }

    /** Less than that of DNS, which other targets go on to have. */
    @Override
    protected int priority() {
        return 0;
    }
}
