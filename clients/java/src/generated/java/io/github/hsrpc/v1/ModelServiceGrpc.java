package io.github.hsrpc.v1;

import static io.grpc.MethodDescriptor.generateFullMethodName;

/**
 * <pre>
 * ModelService describes the model that is loaded, and runs its tokenizer.
 * </pre>
 */
@io.grpc.stub.annotations.GrpcGenerated
public final class ModelServiceGrpc {

  private ModelServiceGrpc() {}

  public static final String SERVICE_NAME = "hsrpc.v1.ModelService";

  // Static method descriptors that strictly reflect the proto.
  private static volatile io.grpc.MethodDescriptor<io.github.hsrpc.v1.GetModelRequest,
      io.github.hsrpc.v1.GetModelResponse> getGetModelMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GetModel",
      requestType = io.github.hsrpc.v1.GetModelRequest.class,
      responseType = io.github.hsrpc.v1.GetModelResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<io.github.hsrpc.v1.GetModelRequest,
      io.github.hsrpc.v1.GetModelResponse> getGetModelMethod() {
    io.grpc.MethodDescriptor<io.github.hsrpc.v1.GetModelRequest, io.github.hsrpc.v1.GetModelResponse> getGetModelMethod;
    if ((getGetModelMethod = ModelServiceGrpc.getGetModelMethod) == null) {
      synchronized (ModelServiceGrpc.class) {
        if ((getGetModelMethod = ModelServiceGrpc.getGetModelMethod) == null) {
          ModelServiceGrpc.getGetModelMethod = getGetModelMethod =
              io.grpc.MethodDescriptor.<io.github.hsrpc.v1.GetModelRequest, io.github.hsrpc.v1.GetModelResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GetModel"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.github.hsrpc.v1.GetModelRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.github.hsrpc.v1.GetModelResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ModelServiceMethodDescriptorSupplier("GetModel"))
              .build();
        }
      }
    }
    return getGetModelMethod;
  }

  private static volatile io.grpc.MethodDescriptor<io.github.hsrpc.v1.TokenizeRequest,
      io.github.hsrpc.v1.TokenizeResponse> getTokenizeMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "Tokenize",
      requestType = io.github.hsrpc.v1.TokenizeRequest.class,
      responseType = io.github.hsrpc.v1.TokenizeResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<io.github.hsrpc.v1.TokenizeRequest,
      io.github.hsrpc.v1.TokenizeResponse> getTokenizeMethod() {
    io.grpc.MethodDescriptor<io.github.hsrpc.v1.TokenizeRequest, io.github.hsrpc.v1.TokenizeResponse> getTokenizeMethod;
    if ((getTokenizeMethod = ModelServiceGrpc.getTokenizeMethod) == null) {
      synchronized (ModelServiceGrpc.class) {
        if ((getTokenizeMethod = ModelServiceGrpc.getTokenizeMethod) == null) {
          ModelServiceGrpc.getTokenizeMethod = getTokenizeMethod =
              io.grpc.MethodDescriptor.<io.github.hsrpc.v1.TokenizeRequest, io.github.hsrpc.v1.TokenizeResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "Tokenize"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.github.hsrpc.v1.TokenizeRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.github.hsrpc.v1.TokenizeResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ModelServiceMethodDescriptorSupplier("Tokenize"))
              .build();
        }
      }
    }
    return getTokenizeMethod;
  }

  private static volatile io.grpc.MethodDescriptor<io.github.hsrpc.v1.DetokenizeRequest,
      io.github.hsrpc.v1.DetokenizeResponse> getDetokenizeMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "Detokenize",
      requestType = io.github.hsrpc.v1.DetokenizeRequest.class,
      responseType = io.github.hsrpc.v1.DetokenizeResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<io.github.hsrpc.v1.DetokenizeRequest,
      io.github.hsrpc.v1.DetokenizeResponse> getDetokenizeMethod() {
    io.grpc.MethodDescriptor<io.github.hsrpc.v1.DetokenizeRequest, io.github.hsrpc.v1.DetokenizeResponse> getDetokenizeMethod;
    if ((getDetokenizeMethod = ModelServiceGrpc.getDetokenizeMethod) == null) {
      synchronized (ModelServiceGrpc.class) {
        if ((getDetokenizeMethod = ModelServiceGrpc.getDetokenizeMethod) == null) {
          ModelServiceGrpc.getDetokenizeMethod = getDetokenizeMethod =
              io.grpc.MethodDescriptor.<io.github.hsrpc.v1.DetokenizeRequest, io.github.hsrpc.v1.DetokenizeResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "Detokenize"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.github.hsrpc.v1.DetokenizeRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.github.hsrpc.v1.DetokenizeResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ModelServiceMethodDescriptorSupplier("Detokenize"))
              .build();
        }
      }
    }
    return getDetokenizeMethod;
  }

  /**
   * Creates a new async stub that supports all call types for the service
   */
  public static ModelServiceStub newStub(io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ModelServiceStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ModelServiceStub>() {
        @java.lang.Override
        public ModelServiceStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ModelServiceStub(channel, callOptions);
        }
      };
    return ModelServiceStub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports unary and streaming output calls on the service
   */
  public static ModelServiceBlockingStub newBlockingStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ModelServiceBlockingStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ModelServiceBlockingStub>() {
        @java.lang.Override
        public ModelServiceBlockingStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ModelServiceBlockingStub(channel, callOptions);
        }
      };
    return ModelServiceBlockingStub.newStub(factory, channel);
  }

  /**
   * Creates a new ListenableFuture-style stub that supports unary calls on the service
   */
  public static ModelServiceFutureStub newFutureStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ModelServiceFutureStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ModelServiceFutureStub>() {
        @java.lang.Override
        public ModelServiceFutureStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ModelServiceFutureStub(channel, callOptions);
        }
      };
    return ModelServiceFutureStub.newStub(factory, channel);
  }

  /**
   * <pre>
   * ModelService describes the model that is loaded, and runs its tokenizer.
   * </pre>
   */
  public static abstract class ModelServiceImplBase implements io.grpc.BindableService {

    /**
     * <pre>
     * GetModel returns the model's name, sizes, and how its tokens are cached.
     * </pre>
     */
    public void getModel(io.github.hsrpc.v1.GetModelRequest request,
        io.grpc.stub.StreamObserver<io.github.hsrpc.v1.GetModelResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGetModelMethod(), responseObserver);
    }

    /**
     * <pre>
     * Tokenize turns text, or a conversation, into the token ids that Generate would make of it. It takes a place in the queue while it waits,
     * and is refused where a Generate would be.
     * </pre>
     */
    public void tokenize(io.github.hsrpc.v1.TokenizeRequest request,
        io.grpc.stub.StreamObserver<io.github.hsrpc.v1.TokenizeResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getTokenizeMethod(), responseObserver);
    }

    /**
     * <pre>
     * Detokenize turns token ids into text. It takes a place in the queue while it waits, as Tokenize does.
     * </pre>
     */
    public void detokenize(io.github.hsrpc.v1.DetokenizeRequest request,
        io.grpc.stub.StreamObserver<io.github.hsrpc.v1.DetokenizeResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getDetokenizeMethod(), responseObserver);
    }

    @java.lang.Override public final io.grpc.ServerServiceDefinition bindService() {
      return io.grpc.ServerServiceDefinition.builder(getServiceDescriptor())
          .addMethod(
            getGetModelMethod(),
            io.grpc.stub.ServerCalls.asyncUnaryCall(
              new MethodHandlers<
                io.github.hsrpc.v1.GetModelRequest,
                io.github.hsrpc.v1.GetModelResponse>(
                  this, METHODID_GET_MODEL)))
          .addMethod(
            getTokenizeMethod(),
            io.grpc.stub.ServerCalls.asyncUnaryCall(
              new MethodHandlers<
                io.github.hsrpc.v1.TokenizeRequest,
                io.github.hsrpc.v1.TokenizeResponse>(
                  this, METHODID_TOKENIZE)))
          .addMethod(
            getDetokenizeMethod(),
            io.grpc.stub.ServerCalls.asyncUnaryCall(
              new MethodHandlers<
                io.github.hsrpc.v1.DetokenizeRequest,
                io.github.hsrpc.v1.DetokenizeResponse>(
                  this, METHODID_DETOKENIZE)))
          .build();
    }
  }

  /**
   * <pre>
   * ModelService describes the model that is loaded, and runs its tokenizer.
   * </pre>
   */
  public static final class ModelServiceStub extends io.grpc.stub.AbstractAsyncStub<ModelServiceStub> {
    private ModelServiceStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ModelServiceStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ModelServiceStub(channel, callOptions);
    }

    /**
     * <pre>
     * GetModel returns the model's name, sizes, and how its tokens are cached.
     * </pre>
     */
    public void getModel(io.github.hsrpc.v1.GetModelRequest request,
        io.grpc.stub.StreamObserver<io.github.hsrpc.v1.GetModelResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getGetModelMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Tokenize turns text, or a conversation, into the token ids that Generate would make of it. It takes a place in the queue while it waits,
     * and is refused where a Generate would be.
     * </pre>
     */
    public void tokenize(io.github.hsrpc.v1.TokenizeRequest request,
        io.grpc.stub.StreamObserver<io.github.hsrpc.v1.TokenizeResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getTokenizeMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Detokenize turns token ids into text. It takes a place in the queue while it waits, as Tokenize does.
     * </pre>
     */
    public void detokenize(io.github.hsrpc.v1.DetokenizeRequest request,
        io.grpc.stub.StreamObserver<io.github.hsrpc.v1.DetokenizeResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getDetokenizeMethod(), getCallOptions()), request, responseObserver);
    }
  }

  /**
   * <pre>
   * ModelService describes the model that is loaded, and runs its tokenizer.
   * </pre>
   */
  public static final class ModelServiceBlockingStub extends io.grpc.stub.AbstractBlockingStub<ModelServiceBlockingStub> {
    private ModelServiceBlockingStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ModelServiceBlockingStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ModelServiceBlockingStub(channel, callOptions);
    }

    /**
     * <pre>
     * GetModel returns the model's name, sizes, and how its tokens are cached.
     * </pre>
     */
    public io.github.hsrpc.v1.GetModelResponse getModel(io.github.hsrpc.v1.GetModelRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getGetModelMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Tokenize turns text, or a conversation, into the token ids that Generate would make of it. It takes a place in the queue while it waits,
     * and is refused where a Generate would be.
     * </pre>
     */
    public io.github.hsrpc.v1.TokenizeResponse tokenize(io.github.hsrpc.v1.TokenizeRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getTokenizeMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Detokenize turns token ids into text. It takes a place in the queue while it waits, as Tokenize does.
     * </pre>
     */
    public io.github.hsrpc.v1.DetokenizeResponse detokenize(io.github.hsrpc.v1.DetokenizeRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getDetokenizeMethod(), getCallOptions(), request);
    }
  }

  /**
   * <pre>
   * ModelService describes the model that is loaded, and runs its tokenizer.
   * </pre>
   */
  public static final class ModelServiceFutureStub extends io.grpc.stub.AbstractFutureStub<ModelServiceFutureStub> {
    private ModelServiceFutureStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ModelServiceFutureStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ModelServiceFutureStub(channel, callOptions);
    }

    /**
     * <pre>
     * GetModel returns the model's name, sizes, and how its tokens are cached.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<io.github.hsrpc.v1.GetModelResponse> getModel(
        io.github.hsrpc.v1.GetModelRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getGetModelMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Tokenize turns text, or a conversation, into the token ids that Generate would make of it. It takes a place in the queue while it waits,
     * and is refused where a Generate would be.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<io.github.hsrpc.v1.TokenizeResponse> tokenize(
        io.github.hsrpc.v1.TokenizeRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getTokenizeMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Detokenize turns token ids into text. It takes a place in the queue while it waits, as Tokenize does.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<io.github.hsrpc.v1.DetokenizeResponse> detokenize(
        io.github.hsrpc.v1.DetokenizeRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getDetokenizeMethod(), getCallOptions()), request);
    }
  }

  private static final int METHODID_GET_MODEL = 0;
  private static final int METHODID_TOKENIZE = 1;
  private static final int METHODID_DETOKENIZE = 2;

  private static final class MethodHandlers<Req, Resp> implements
      io.grpc.stub.ServerCalls.UnaryMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ServerStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ClientStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.BidiStreamingMethod<Req, Resp> {
    private final ModelServiceImplBase serviceImpl;
    private final int methodId;

    MethodHandlers(ModelServiceImplBase serviceImpl, int methodId) {
      this.serviceImpl = serviceImpl;
      this.methodId = methodId;
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public void invoke(Req request, io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        case METHODID_GET_MODEL:
          serviceImpl.getModel((io.github.hsrpc.v1.GetModelRequest) request,
              (io.grpc.stub.StreamObserver<io.github.hsrpc.v1.GetModelResponse>) responseObserver);
          break;
        case METHODID_TOKENIZE:
          serviceImpl.tokenize((io.github.hsrpc.v1.TokenizeRequest) request,
              (io.grpc.stub.StreamObserver<io.github.hsrpc.v1.TokenizeResponse>) responseObserver);
          break;
        case METHODID_DETOKENIZE:
          serviceImpl.detokenize((io.github.hsrpc.v1.DetokenizeRequest) request,
              (io.grpc.stub.StreamObserver<io.github.hsrpc.v1.DetokenizeResponse>) responseObserver);
          break;
        default:
          throw new AssertionError();
      }
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public io.grpc.stub.StreamObserver<Req> invoke(
        io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        default:
          throw new AssertionError();
      }
    }
  }

  private static abstract class ModelServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoFileDescriptorSupplier, io.grpc.protobuf.ProtoServiceDescriptorSupplier {
    ModelServiceBaseDescriptorSupplier() {}

    @java.lang.Override
    public com.google.protobuf.Descriptors.FileDescriptor getFileDescriptor() {
      return io.github.hsrpc.v1.Model.getDescriptor();
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.ServiceDescriptor getServiceDescriptor() {
      return getFileDescriptor().findServiceByName("ModelService");
    }
  }

  private static final class ModelServiceFileDescriptorSupplier
      extends ModelServiceBaseDescriptorSupplier {
    ModelServiceFileDescriptorSupplier() {}
  }

  private static final class ModelServiceMethodDescriptorSupplier
      extends ModelServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoMethodDescriptorSupplier {
    private final String methodName;

    ModelServiceMethodDescriptorSupplier(String methodName) {
      this.methodName = methodName;
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.MethodDescriptor getMethodDescriptor() {
      return getServiceDescriptor().findMethodByName(methodName);
    }
  }

  private static volatile io.grpc.ServiceDescriptor serviceDescriptor;

  public static io.grpc.ServiceDescriptor getServiceDescriptor() {
    io.grpc.ServiceDescriptor result = serviceDescriptor;
    if (result == null) {
      synchronized (ModelServiceGrpc.class) {
        result = serviceDescriptor;
        if (result == null) {
          serviceDescriptor = result = io.grpc.ServiceDescriptor.newBuilder(SERVICE_NAME)
              .setSchemaDescriptor(new ModelServiceFileDescriptorSupplier())
              .addMethod(getGetModelMethod())
              .addMethod(getTokenizeMethod())
              .addMethod(getDetokenizeMethod())
              .build();
        }
      }
    }
    return result;
  }
}
