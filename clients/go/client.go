// Package hsrpc calls a server of hsrpc: it streams what a language model makes of a prompt.
//
//	client, err := hsrpc.NewClient("localhost:50051")
//	...
//	stream := client.Generate(ctx, hsrpc.Text("Once upon a time"), hsrpc.MaxTokens(64))
//	defer stream.Close()
//	for stream.Next() {
//		fmt.Print(stream.Text())
//	}
//	err = stream.Err()
//
// Failed calls give an *Error, be they made by the methods here or by the generated stubs of a Client. Calls that meet
// a server which is busy, or not there for the moment, are tried again as long as no response has come.
package hsrpc

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/hsrpc/hsrpc/clients/go/hsrpcv1"
)

// DefaultTarget is where a server listens unless it is told otherwise.
const DefaultTarget = "localhost:50051"

const readyPoll = 200 * time.Millisecond

// Client calls a server. It may be used by many goroutines at once.
type Client struct {
	// Generation, Model and Server are the generated stubs of the services, for what the methods of Client do not do.
	Generation hsrpcv1.GenerationServiceClient
	Model      hsrpcv1.ModelServiceClient
	Server     hsrpcv1.ServerServiceClient

	conn    *grpc.ClientConn
	timeout time.Duration
}

// NewClient makes a client of the server at target, which is host:port or any name that gRPC resolves; "" is
// DefaultTarget. The connection is made by the first call. Without options it is not encrypted.
func NewClient(target string, options ...Option) (*Client, error) {
	settings := connection{}
	for _, option := range options {
		option(&settings)
	}
	dialOptions, err := settings.dialOptions()
	if err != nil {
		return nil, err
	}
	// Not grpc.NewClient, which releases before 1.63 do not have.
	conn, err := grpc.Dial(resolvable(target), dialOptions...)
	if err != nil {
		return nil, err
	}
	return &Client{
		Generation: hsrpcv1.NewGenerationServiceClient(conn),
		Model:      hsrpcv1.NewModelServiceClient(conn),
		Server:     hsrpcv1.NewServerServiceClient(conn),
		conn:       conn,
		timeout:    settings.timeout,
	}, nil
}

// Close ends all calls and the connection.
func (c *Client) Close() error {
	return c.conn.Close()
}

// Generate streams the continuation of a prompt, which is a Text or TokenIDs. Cancelling the context, or closing the
// stream, stops the work of the server.
func (c *Client) Generate(ctx context.Context, prompt Prompt, settings ...Setting) *Stream {
	request := &hsrpcv1.GenerateRequest{}
	prompt.setInput(request)
	return c.stream(ctx, request, settings)
}

// Chat streams the answer of a model to a conversation. Tools, TemplateParameters and ContinueFinalMessage are settings
// of it.
func (c *Client) Chat(ctx context.Context, messages []*hsrpcv1.Message, settings ...Setting) *Stream {
	chat := &hsrpcv1.GenerateRequest_Chat{Chat: &hsrpcv1.Chat{Messages: messages}}
	return c.stream(ctx, &hsrpcv1.GenerateRequest{Input: chat}, settings)
}

// Complete waits for the whole continuation of a prompt.
func (c *Client) Complete(ctx context.Context, prompt Prompt, settings ...Setting) (*Completion, error) {
	return c.Generate(ctx, prompt, settings...).completion()
}

// CompleteChat waits for the whole answer to a conversation.
func (c *Client) CompleteChat(
	ctx context.Context, messages []*hsrpcv1.Message, settings ...Setting,
) (*Completion, error) {
	return c.Chat(ctx, messages, settings...).completion()
}

// Abort ends the live request of that id, and says whether there was one. Its stream then finishes with
// FINISH_REASON_ABORTED and the text it has so far.
func (c *Client) Abort(ctx context.Context, requestID string) (bool, error) {
	response, err := c.Generation.Abort(ctx, &hsrpcv1.AbortRequest{RequestId: requestID})
	return response.GetAborted(), err
}

// WaitReady returns once the server has loaded its model, with what it says of the model. Give the context a deadline.
func (c *Client) WaitReady(ctx context.Context) (*hsrpcv1.GetModelResponse, error) {
	for {
		model, err := c.Model.GetModel(ctx, &hsrpcv1.GetModelRequest{})
		if err == nil || FromError(err).Code != codes.Unavailable {
			return model, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(readyPoll):
		}
	}
}

func (c *Client) stream(ctx context.Context, request *hsrpcv1.GenerateRequest, settings []Setting) *Stream {
	ctx, cancel := withTimeout(ctx, c.timeout)
	stream := &Stream{cancel: cancel}
	for _, set := range settings {
		if err := set(request); err != nil {
			stream.end(err)
			return stream
		}
	}
	call, err := c.Generation.Generate(ctx, request)
	if err != nil {
		stream.end(err)
		return stream
	}
	stream.call = call
	return stream
}
