package hsrpc

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/rand"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Releases of gRPC before 1.43 follow the retryPolicy of a service config only where an environment variable was set
// before the program started. For them, such as that of Debian 12, the interceptors here do what the policy says.

// retriesByItself says whether that release of gRPC follows the retryPolicy.
func retriesByItself(version string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil {
		return true
	}
	return major > 1 || minor >= 43
}

func retrying() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithDisableRetry(), // whatever the environment says: attempts of both would multiply
		grpc.WithChainUnaryInterceptor(retryUnary),
		grpc.WithChainStreamInterceptor(retryStream),
	}
}

// attempts counts those of one call.
type attempts struct {
	made          int
	sincePushback int
}

// next waits until another attempt is due. An error is that of the call: there is none.
func (a *attempts) next(ctx context.Context, err error, trailer metadata.MD) error {
	a.made++
	code := status.Code(err)
	if a.made >= maxAttempts || code != codes.Unavailable && code != codes.ResourceExhausted {
		return err
	}
	delay, ok := a.delay(trailer)
	if !ok {
		return err
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// delay is what the server asks for, else the backoff give or take a fifth; false: the server wants no other attempt.
func (a *attempts) delay(trailer metadata.MD) (time.Duration, bool) {
	if pushback := trailer.Get("grpc-retry-pushback-ms"); len(pushback) > 0 {
		a.sincePushback = 0
		milliseconds, err := strconv.Atoi(pushback[0])
		return time.Duration(milliseconds) * time.Millisecond, err == nil && milliseconds >= 0 && len(pushback) == 1
	}
	backoff := float64(initialBackoff) * math.Pow(backoffMultiplier, float64(a.sincePushback))
	a.sincePushback++
	jitter := 0.8 + 0.4*rand.New(rand.NewSource(time.Now().UnixNano())).Float64()
	return time.Duration(math.Min(backoff, float64(maxBackoff)) * jitter), true
}

func retryUnary(
	ctx context.Context, method string, request, response interface{}, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	var made attempts
	for {
		var trailer metadata.MD
		err := invoke(ctx, method, request, response, conn, append(options, grpc.Trailer(&trailer))...)
		if err == nil {
			return nil
		}
		if err := made.next(ctx, err, trailer); err != nil {
			return err
		}
	}
}

func retryStream(
	ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	if description.ClientStreams { // there are none in hsrpc.v1: a request is one message, which can be sent again
		return open(ctx, description, conn, method, options...)
	}
	stream := &retriedStream{ctx: ctx, open: func() (grpc.ClientStream, error) {
		return open(ctx, description, conn, method, options...)
	}}
	for {
		var err error
		if stream.ClientStream, err = stream.open(); err == nil {
			return stream, nil
		}
		if err := stream.made.next(ctx, err, nil); err != nil {
			return nil, err
		}
	}
}

// retriedStream makes its call again while no message has come.
type retriedStream struct {
	grpc.ClientStream
	ctx     context.Context
	open    func() (grpc.ClientStream, error)
	request interface{}
	made    attempts
	settled bool // a message has come, or the call has ended
}

func (s *retriedStream) SendMsg(message interface{}) error {
	s.request = message
	return s.ClientStream.SendMsg(message)
}

func (s *retriedStream) RecvMsg(message interface{}) error {
	trailer, err := s.receive(message)
	for !s.settled && err != nil && err != io.EOF {
		if err := s.made.next(s.ctx, err, trailer); err != nil {
			s.settled = true
			return err
		}
		trailer, err = s.resend(message)
	}
	s.settled = true
	return err
}

func (s *retriedStream) resend(message interface{}) (metadata.MD, error) {
	stream, err := s.open()
	if err != nil {
		return nil, err
	}
	s.ClientStream = stream
	if err := stream.SendMsg(s.request); err != nil {
		return nil, err
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	return s.receive(message)
}

func (s *retriedStream) receive(message interface{}) (metadata.MD, error) {
	err := s.ClientStream.RecvMsg(message)
	if err == nil || err == io.EOF {
		return nil, err
	}
	return s.ClientStream.Trailer(), err
}
