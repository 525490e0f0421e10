package hsrpc

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
)

// The interceptors here are around every call, also those of the generated stubs.

// unaryCall gives a call without a deadline one, and an *Error in place of what gRPC returns.
func unaryCall(timeout time.Duration) grpc.UnaryClientInterceptor {
	return func(
		ctx context.Context, method string, request, response interface{}, conn *grpc.ClientConn,
		invoke grpc.UnaryInvoker, options ...grpc.CallOption,
	) error {
		ctx, cancel := withTimeout(ctx, timeout)
		defer cancel()
		connectNow(conn)
		return typed(invoke(ctx, method, request, response, conn, options...))
	}
}

// streamCall gives an *Error in place of what gRPC returns. Deadlines are those of the caller.
func streamCall(
	ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	connectNow(conn)
	stream, err := open(ctx, description, conn, method, options...)
	if err != nil {
		return nil, typed(err)
	}
	return typedStream{stream}, nil
}

// connectNow looks for a server that was away: gRPC would let this call fail, and look when it is time again.
func connectNow(conn *grpc.ClientConn) {
	if conn.GetState() == connectivity.TransientFailure {
		conn.ResetConnectBackoff()
	}
}

// withTimeout gives a context that has no deadline one; 0 is none.
func withTimeout(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok || timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, timeout)
}

type typedStream struct{ grpc.ClientStream }

func (s typedStream) SendMsg(message interface{}) error {
	return typed(s.ClientStream.SendMsg(message))
}

func (s typedStream) RecvMsg(message interface{}) error {
	return typed(s.ClientStream.RecvMsg(message))
}
