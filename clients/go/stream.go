package hsrpc

import (
	"context"
	"io"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hsrpc/hsrpc/clients/go/hsrpcv1"
)

// Stream is the output of one request as it comes. Loop over Next, then ask Err. A stream that is left early must be
// closed, or its context cancelled. It belongs to one goroutine; Close may be called from any.
type Stream struct {
	call   hsrpcv1.GenerationService_GenerateClient
	cancel context.CancelFunc
	closed int32 // 1 once Close was called
	ended  bool
	err    error

	start  *hsrpcv1.Start
	delta  *hsrpcv1.Delta
	finish *hsrpcv1.Finish
}

// Completion is the whole output of a request.
type Completion struct {
	Text string
	// TokenIDs are there with ReturnTokenIDs, Logprobs with Logprobs.
	TokenIDs []int32
	Logprobs []*hsrpcv1.TokenLogprob
	// PromptLogprobs are there with PromptLogprobs, one for each token of the prompt but the first.
	PromptLogprobs []*hsrpcv1.TokenLogprob
	// Start has the prompt's facts and the settings in effect; Finish says why the output ended, and what it took.
	Start  *hsrpcv1.Start
	Finish *hsrpcv1.Finish
}

// Next waits for the next piece of output; false: it has ended, and Err says how.
func (s *Stream) Next() bool {
	for !s.ended {
		response, err := s.call.Recv()
		switch {
		case err == io.EOF && s.finish == nil:
			s.end(fromStatus(status.New(codes.DataLoss, "the stream ended before its last response")))
		case err == io.EOF:
			s.end(nil)
		case err != nil:
			s.end(err)
		default:
			s.read(response)
			if response.GetDelta() != nil {
				return true
			}
		}
	}
	return false
}

// Text is the new text since the last call of Next; the texts one after the other are the output.
func (s *Stream) Text() string {
	return s.delta.GetText()
}

// Delta is the new piece of output, with token ids and logprobs where those were asked for.
func (s *Stream) Delta() *hsrpcv1.Delta {
	return s.delta
}

// Start has facts about the prompt, and the settings in effect; it is there once Next has returned.
func (s *Stream) Start() *hsrpcv1.Start {
	return s.start
}

// Finish says why the output ended, and what it took; it is there after the last call of Next, unless Err is.
func (s *Stream) Finish() *hsrpcv1.Finish {
	return s.finish
}

// Err is an *Error if the call did not end well. A stream that was closed has none.
func (s *Stream) Err() error {
	return s.err
}

// Close stops the work, if it has not ended. It always returns nil.
func (s *Stream) Close() error {
	atomic.StoreInt32(&s.closed, 1)
	s.cancel()
	return nil
}

// WriteTo writes the text as it comes, and closes the stream.
func (s *Stream) WriteTo(writer io.Writer) (int64, error) {
	defer s.Close()
	var written int64
	for s.Next() {
		count, err := io.WriteString(writer, s.Text())
		written += int64(count)
		if err != nil {
			return written, err
		}
	}
	return written, s.Err()
}

func (s *Stream) completion() (*Completion, error) {
	defer s.Close()
	var text strings.Builder
	whole := &Completion{}
	for s.Next() {
		text.WriteString(s.Text())
		whole.TokenIDs = append(whole.TokenIDs, s.delta.GetTokenIds()...)
		whole.Logprobs = append(whole.Logprobs, s.delta.GetLogprobs()...)
		whole.PromptLogprobs = append(whole.PromptLogprobs, s.delta.GetPromptLogprobs()...)
	}
	if s.err != nil {
		return nil, s.err
	}
	whole.Text, whole.Start, whole.Finish = text.String(), s.start, s.finish
	return whole, nil
}

func (s *Stream) read(response *hsrpcv1.GenerateResponse) {
	s.delta = response.GetDelta()
	if response.GetStart() != nil {
		s.start = response.GetStart()
	}
	if response.GetFinish() != nil {
		s.finish = response.GetFinish()
	}
}

// end is the end of the call; nil: it ended well.
func (s *Stream) end(err error) {
	s.ended = true
	s.cancel()
	if atomic.LoadInt32(&s.closed) == 0 {
		s.err = err
	}
}
