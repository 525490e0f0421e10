// Command conformance makes the calls that lines of JSON on its input describe, and answers each with a line of JSON:
// ../conformance drives it. One client serves all calls of a line.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	hsrpc "github.com/hsrpc/hsrpc/clients/go"
	"github.com/hsrpc/hsrpc/clients/go/hsrpcv1"
)

const pollInterval = 20 * time.Millisecond

type order struct {
	ID          string          `json:"id"`
	Target      string          `json:"target"`
	TLS         *files          `json:"tls"`
	Token       *string         `json:"token"`
	Call        string          `json:"call"`
	Request     json.RawMessage `json:"request"`
	DeadlineS   *float64        `json:"deadline_s"`
	CancelAfter *int            `json:"cancel_after"`
	Streams     int             `json:"streams"`
	Repeat      int             `json:"repeat"`
	PauseFile   *string         `json:"pause_file"`
}

type files struct {
	CA   string `json:"ca"`
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

type answer struct {
	ID      string    `json:"id"`
	Results []*result `json:"results"`
}

type result struct {
	Text             string    `json:"text"`
	Deltas           int       `json:"deltas"`
	TokenIDs         []int32   `json:"token_ids"`
	Logprobs         []logprob `json:"logprobs"`
	PromptTokens     int32     `json:"prompt_tokens"`
	CompletionTokens int32     `json:"completion_tokens"`
	FinishReason     *string   `json:"finish_reason"`
	StopString       *string   `json:"stop_string"`
	Cancelled        bool      `json:"cancelled"`
	Error            *failure  `json:"error"`
}

type logprob struct {
	TokenID int32   `json:"token_id"`
	Logprob float64 `json:"logprob"`
	Rank    int32   `json:"rank"`
	Top     []top   `json:"top"`
}

type top struct {
	TokenID int32   `json:"token_id"`
	Logprob float64 `json:"logprob"`
}

type failure struct {
	Code        string            `json:"code"`
	Message     string            `json:"message"`
	Fields      []violation       `json:"fields"`
	RetryDelayS *float64          `json:"retry_delay_s"`
	Reason      *string           `json:"reason"`
	Domain      *string           `json:"domain"`
	Metadata    map[string]string `json:"metadata"`
}

type violation struct {
	Field       string `json:"field"`
	Description string `json:"description"`
}

func main() {
	if err := serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// serve answers line by line. A line may be as long as the largest prompt.
func serve(input io.Reader, output io.Writer) error {
	lines, answers := bufio.NewReader(input), json.NewEncoder(output)
	answers.SetEscapeHTML(false)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 1 {
			given := order{Streams: 1, Repeat: 1}
			if err := json.Unmarshal(line, &given); err != nil {
				return err
			}
			results, err := follow(&given)
			if err != nil {
				return fmt.Errorf("%s: %w", given.ID, err)
			}
			if err := answers.Encode(answer{given.ID, results}); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func follow(given *order) ([]*result, error) {
	request := &hsrpcv1.GenerateRequest{}
	if err := protojson.Unmarshal(given.Request, request); err != nil {
		return nil, err
	}
	client, err := hsrpc.NewClient(given.Target, options(given)...)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	results := make([]*result, given.Streams*given.Repeat)
	for round := 0; round < given.Repeat; round++ {
		if round > 0 && given.PauseFile != nil {
			if err := pause(*given.PauseFile); err != nil {
				return nil, err
			}
		}
		var calls sync.WaitGroup
		for stream := 0; stream < given.Streams; stream++ {
			calls.Add(1)
			go func(place int) {
				defer calls.Done()
				results[place] = call(client, given, request)
			}(round*given.Streams + stream)
		}
		calls.Wait()
	}
	return results, nil
}

func options(given *order) []hsrpc.Option {
	var options []hsrpc.Option
	if given.TLS != nil {
		options = append(options, hsrpc.WithTLS(given.TLS.CA))
		if given.TLS.Cert != "" {
			options = append(options, hsrpc.WithClientCertificate(given.TLS.Cert, given.TLS.Key))
		}
	}
	if given.Token != nil {
		options = append(options, hsrpc.WithToken(*given.Token), hsrpc.AllowPlaintextToken())
	}
	if given.DeadlineS != nil {
		options = append(options, hsrpc.WithTimeout(time.Duration(*given.DeadlineS*float64(time.Second))))
	}
	return options
}

// pause says that it waits, and waits until it may go on.
func pause(path string) error {
	if err := os.WriteFile(path+".waiting", nil, 0o600); err != nil {
		return err
	}
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		time.Sleep(pollInterval)
	}
}

func call(client *hsrpc.Client, given *order, request *hsrpcv1.GenerateRequest) *result {
	ctx := context.Background()
	asGiven := func(made *hsrpcv1.GenerateRequest) error {
		proto.Reset(made)
		proto.Merge(made, request)
		return nil
	}
	messages := request.GetChat().GetMessages()
	switch given.Call {
	case "generate":
		return read(client.Generate(ctx, prompt(request), asGiven), given.CancelAfter)
	case "chat":
		return read(client.Chat(ctx, messages, asGiven), given.CancelAfter)
	case "text":
		return whole(client.Complete(ctx, prompt(request), asGiven))
	case "chat_text":
		return whole(client.CompleteChat(ctx, messages, asGiven))
	}
	return failed(fmt.Errorf("call %q: unknown; give generate, chat, text or chat_text", given.Call))
}

func prompt(request *hsrpcv1.GenerateRequest) hsrpc.Prompt {
	if ids := request.GetTokenIds(); ids != nil {
		return hsrpc.TokenIDs(ids.GetIds())
	}
	return hsrpc.Text(request.GetText())
}

func read(stream *hsrpc.Stream, cancelAfter *int) *result {
	defer stream.Close()
	got := newResult()
	for stream.Next() {
		delta := stream.Delta()
		got.Text += delta.GetText()
		got.TokenIDs = append(got.TokenIDs, delta.GetTokenIds()...)
		got.Logprobs = append(got.Logprobs, logprobs(delta.GetLogprobs())...)
		if delta.GetText() != "" || len(delta.GetTokenIds()) > 0 {
			got.Deltas++
		}
		if cancelAfter != nil && got.Deltas >= *cancelAfter {
			got.Cancelled = true
			break
		}
	}
	got.end(stream.Start(), stream.Finish())
	if err := stream.Err(); err != nil {
		got.Error = describe(err)
	}
	return got
}

func whole(completion *hsrpc.Completion, err error) *result {
	if err != nil {
		return failed(err)
	}
	got := newResult()
	got.Text = completion.Text
	got.TokenIDs = append(got.TokenIDs, completion.TokenIDs...)
	got.Logprobs = logprobs(completion.Logprobs)
	got.end(completion.Start, completion.Finish)
	return got
}

// newResult has lists that are written as lists, be they empty.
func newResult() *result {
	return &result{TokenIDs: []int32{}, Logprobs: []logprob{}}
}

func failed(err error) *result {
	got := newResult()
	got.Error = describe(err)
	return got
}

func (r *result) end(start *hsrpcv1.Start, finish *hsrpcv1.Finish) {
	r.PromptTokens = start.GetPromptTokens()
	if finish == nil {
		return
	}
	reason := finish.GetReason().String()
	r.FinishReason = &reason
	r.CompletionTokens = finish.GetUsage().GetCompletionTokens()
	if matched, ok := finish.GetMatched().(*hsrpcv1.Finish_StopString); ok {
		r.StopString = &matched.StopString
	}
}

func logprobs(given []*hsrpcv1.TokenLogprob) []logprob {
	written := make([]logprob, 0, len(given))
	for _, token := range given {
		best := make([]top, 0, len(token.GetTop()))
		for _, other := range token.GetTop() {
			best = append(best, top{other.GetTokenId(), other.GetLogprob()})
		}
		written = append(written, logprob{token.GetTokenId(), token.GetLogprob(), token.GetRank(), best})
	}
	return written
}

func describe(err error) *failure {
	from := hsrpc.FromError(err)
	to := &failure{
		Code:     code.Code(from.Code).String(),
		Message:  from.Message,
		Fields:   []violation{},
		Reason:   orNull(from.Reason),
		Domain:   orNull(from.Domain),
		Metadata: map[string]string{},
	}
	for _, field := range from.Fields {
		to.Fields = append(to.Fields, violation{field.Field, field.Description})
	}
	for key, value := range from.Metadata {
		to.Metadata[key] = value
	}
	if from.RetryDelay > 0 {
		seconds := from.RetryDelay.Seconds()
		to.RetryDelayS = &seconds
	}
	return to
}

func orNull(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}
