package hsrpc

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hsrpc/hsrpc/clients/go/hsrpcv1"
)

// answerFunc is what a server does with the call of that number, from 1 on.
type answerFunc func(int, *hsrpcv1.GenerateRequest, hsrpcv1.GenerationService_GenerateServer) error

type server struct {
	hsrpcv1.UnimplementedGenerationServiceServer
	answer answerFunc
	mutex  sync.Mutex
	calls  int
}

func (s *server) Generate(request *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer) error {
	s.mutex.Lock()
	s.calls++
	number := s.calls
	s.mutex.Unlock()
	return s.answer(number, request, stream)
}

func (s *server) Abort(context.Context, *hsrpcv1.AbortRequest) (*hsrpcv1.AbortResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.calls++; s.calls == 1 {
		return nil, status.Error(codes.Unavailable, "loading")
	}
	return &hsrpcv1.AbortResponse{Aborted: true}, nil
}

// serve starts a server, and gives a client of it.
func serve(t *testing.T, answer answerFunc, options ...Option) (*server, *Client) {
	t.Helper()
	service := &server{answer: answer}
	_, address := listen(t, service, "127.0.0.1:0")
	return service, connect(t, address, options...)
}

func listen(t *testing.T, service *server, address string) (*grpc.Server, string) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	runner := grpc.NewServer()
	hsrpcv1.RegisterGenerationServiceServer(runner, service)
	go runner.Serve(listener)
	t.Cleanup(runner.Stop)
	return runner, listener.Addr().String()
}

func connect(t *testing.T, address string, options ...Option) *Client {
	t.Helper()
	client, err := NewClient(address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func piece(text string) *hsrpcv1.GenerateResponse {
	return &hsrpcv1.GenerateResponse{Start: &hsrpcv1.Start{}, Delta: &hsrpcv1.Delta{Text: text}}
}

func story(_ int, _ *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer) error {
	if err := stream.Send(piece("Once ")); err != nil {
		return err
	}
	last := piece("upon")
	last.Finish = &hsrpcv1.Finish{Reason: hsrpcv1.FinishReason_FINISH_REASON_EOS}
	return stream.Send(last)
}

// untilCancelled sends one piece and waits for the call to end.
func untilCancelled(ended chan<- struct{}) answerFunc {
	return func(_ int, _ *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer) error {
		if err := stream.Send(piece("Once ")); err != nil {
			return err
		}
		<-stream.Context().Done()
		close(ended)
		return status.FromContextError(stream.Context().Err()).Err()
	}
}

func refuse(code codes.Code, pushback string) func(hsrpcv1.GenerationService_GenerateServer) error {
	return func(stream hsrpcv1.GenerationService_GenerateServer) error {
		if pushback != "" {
			stream.SetTrailer(metadata.Pairs("grpc-retry-pushback-ms", pushback))
		}
		return status.Error(code, "no room")
	}
}

func TestDeltasAreTheOutput(t *testing.T) {
	_, client := serve(t, story)
	stream := client.Generate(context.Background(), Text("?"))
	var texts []string
	for stream.Next() {
		texts = append(texts, stream.Text())
	}
	if stream.Err() != nil || strings.Join(texts, "|") != "Once |upon" || stream.Start() == nil {
		t.Errorf("%q, %v", texts, stream.Err())
	}
	if stream.Finish().GetReason() != hsrpcv1.FinishReason_FINISH_REASON_EOS {
		t.Errorf("finish: %v", stream.Finish())
	}
}

func TestWholeTextAndWriter(t *testing.T) {
	_, client := serve(t, story)
	whole, err := client.CompleteChat(context.Background(), []*hsrpcv1.Message{User("?")})
	if err != nil || whole.Text != "Once upon" || whole.Finish == nil {
		t.Errorf("%v, %v", whole, err)
	}
	var text strings.Builder
	_, err = client.Generate(context.Background(), TokenIDs{1}).WriteTo(&text)
	if err != nil || text.String() != whole.Text {
		t.Errorf("%q, %v", text.String(), err)
	}
}

func TestStreamWithoutFinishFailed(t *testing.T) {
	_, client := serve(t, func(_ int, _ *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer) error {
		return stream.Send(piece("Once"))
	})
	if _, err := client.Complete(context.Background(), Text("?")); FromError(err).Code != codes.DataLoss {
		t.Errorf("%v", err)
	}
}

func TestClosingEarlyEndsTheCallWithoutError(t *testing.T) {
	ended := make(chan struct{})
	_, client := serve(t, untilCancelled(ended))
	stream := client.Generate(context.Background(), Text("?"))
	if !stream.Next() {
		t.Fatal(stream.Err())
	}
	stream.Close()
	<-ended
	if stream.Next() || stream.Err() != nil {
		t.Errorf("%v", stream.Err())
	}
}

func TestCancelledContextIsAnError(t *testing.T) {
	ended := make(chan struct{})
	_, client := serve(t, untilCancelled(ended))
	ctx, cancel := context.WithCancel(context.Background())
	stream := client.Generate(ctx, Text("?"))
	stream.Next()
	cancel()
	<-ended
	if stream.Next() || !errors.Is(stream.Err(), context.Canceled) {
		t.Errorf("%v", stream.Err())
	}
}

func TestDefaultTimeout(t *testing.T) {
	_, client := serve(t, untilCancelled(make(chan struct{})), WithTimeout(50*time.Millisecond))
	_, err := client.Complete(context.Background(), Text("?"))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestOwnDeadlineWinsOverDefaultTimeout(t *testing.T) {
	_, client := serve(t, story, WithTimeout(time.Nanosecond))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := client.Complete(ctx, Text("?")); err != nil {
		t.Error(err)
	}
	if _, err := client.Complete(context.Background(), Text("?")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestDetailsOfErrorsAreDecoded(t *testing.T) {
	_, client := serve(t, func(int, *hsrpcv1.GenerateRequest, hsrpcv1.GenerationService_GenerateServer) error {
		violation := &errdetails.BadRequest_FieldViolation{Field: "stopping.max_tokens", Description: "0 is too few"}
		with, err := status.New(codes.InvalidArgument, "wrong").WithDetails(
			&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{violation}},
			&errdetails.RetryInfo{RetryDelay: durationpb.New(1500 * time.Millisecond)},
			&errdetails.ErrorInfo{Reason: "WHY", Domain: "hsrpc", Metadata: map[string]string{"feature": "x"}},
		)
		if err != nil {
			return err
		}
		return with.Err()
	})
	_, err := client.Complete(context.Background(), Text("?"))
	var failure *Error
	if !errors.As(err, &failure) {
		t.Fatalf("%T", err)
	}
	if failure.Code != codes.InvalidArgument || failure.Message != "wrong" ||
		failure.RetryDelay != 1500*time.Millisecond || failure.Reason != "WHY" ||
		failure.Domain != "hsrpc" || failure.Metadata["feature"] != "x" ||
		len(failure.Fields) != 1 || failure.Fields[0] != (FieldViolation{"stopping.max_tokens", "0 is too few"}) {
		t.Errorf("%+v", failure)
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("status.Code: %v", status.Code(err))
	}
}

func TestRetries(t *testing.T) {
	for name, test := range map[string]struct {
		refuse   func(hsrpcv1.GenerationService_GenerateServer) error
		refusals int
		calls    int
		code     codes.Code
	}{
		"busy, then not":        {refuse(codes.ResourceExhausted, "1"), 2, 3, codes.OK},
		"away, then not":        {refuse(codes.Unavailable, "0"), 4, 5, codes.OK},
		"away too often":        {refuse(codes.Unavailable, "0"), 9, 5, codes.Unavailable},
		"own backoff":           {refuse(codes.Unavailable, ""), 1, 2, codes.OK},
		"server wants no other": {refuse(codes.Unavailable, "-1"), 9, 1, codes.Unavailable},
		"a fault of the caller": {refuse(codes.InvalidArgument, ""), 9, 1, codes.InvalidArgument},
	} {
		test := test
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			service, client := serve(t, func(
				number int, request *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer,
			) error {
				if request.GetText() != "?" {
					return status.Error(codes.Internal, "the request changed")
				}
				if number <= test.refusals {
					return test.refuse(stream)
				}
				return story(number, request, stream)
			})
			_, err := client.Complete(context.Background(), Text("?"))
			if status.Code(err) != test.code || service.calls != test.calls {
				t.Errorf("%v after %d calls", err, service.calls)
			}
		})
	}
}

func TestNothingIsRetriedAfterTheFirstMessage(t *testing.T) {
	service, client := serve(t, func(
		_ int, _ *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer,
	) error {
		if err := stream.Send(piece("Once ")); err != nil {
			return err
		}
		return refuse(codes.Unavailable, "0")(stream)
	})
	_, err := client.Complete(context.Background(), Text("?"))
	if status.Code(err) != codes.Unavailable || service.calls != 1 {
		t.Errorf("%v after %d calls", err, service.calls)
	}
}

func TestWithoutRetries(t *testing.T) {
	service, client := serve(t, func(
		_ int, _ *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer,
	) error {
		return refuse(codes.Unavailable, "0")(stream)
	}, WithoutRetries())
	_, err := client.Complete(context.Background(), Text("?"))
	if status.Code(err) != codes.Unavailable || service.calls != 1 {
		t.Errorf("%v after %d calls", err, service.calls)
	}
}

func TestServerThatIsBackIsFoundAtOnce(t *testing.T) {
	service := &server{answer: story}
	runner, address := listen(t, service, "127.0.0.1:0")
	patience := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Hour, Multiplier: 1, MaxDelay: time.Hour}}
	client := connect(t, address, WithDialOptions(grpc.WithConnectParams(patience)))
	if _, err := client.Complete(context.Background(), Text("?")); err != nil {
		t.Fatal(err)
	}
	runner.Stop()
	if _, err := client.Complete(context.Background(), Text("?")); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	listen(t, service, address)
	if _, err := client.Complete(context.Background(), Text("?")); err != nil {
		t.Error(err)
	}
}

func TestAddressesTakeTurns(t *testing.T) {
	addresses := manual.NewBuilderWithScheme("test")
	var state resolver.State
	services := []*server{{answer: story}, {answer: story}}
	for _, service := range services {
		_, address := listen(t, service, "127.0.0.1:0")
		state.Addresses = append(state.Addresses, resolver.Address{Addr: address})
	}
	addresses.InitialState(state)
	client := connect(t, "test:///any", WithDialOptions(grpc.WithResolvers(addresses)))
	// The second connection may come later than the first calls.
	for begun := time.Now(); services[0].calls == 0 || services[1].calls == 0; {
		if time.Since(begun) > 5*time.Second {
			t.Fatalf("%d and %d calls", services[0].calls, services[1].calls)
		}
		if _, err := client.Complete(context.Background(), Text("?")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnaryCallsAreRetried(t *testing.T) {
	service, client := serve(t, story)
	if aborted, err := client.Abort(context.Background(), "name"); err != nil || !aborted || service.calls != 2 {
		t.Errorf("%v, %v after %d calls", aborted, err, service.calls)
	}
}

func TestDeadlineEndsTheWaitForAnotherAttempt(t *testing.T) {
	_, client := serve(t, func(
		_ int, _ *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer,
	) error {
		return refuse(codes.Unavailable, "60000")(stream)
	}, WithTimeout(50*time.Millisecond))
	if _, err := client.Complete(context.Background(), Text("?")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestReleasesThatRetryByThemselves(t *testing.T) {
	for version, expected := range map[string]bool{
		"1.33.3": false, "1.42.0": false, "1.43.0": true, "1.85.0-dev": true, "2.0.0": true,
	} {
		if retriesByItself(version) != expected {
			t.Error(version)
		}
	}
}

func TestToken(t *testing.T) {
	_, client := serve(t, func(
		number int, request *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer,
	) error {
		given, _ := metadata.FromIncomingContext(stream.Context())
		if value := given.Get("authorization"); len(value) != 1 || value[0] != "Bearer abc" {
			return status.Errorf(codes.Unauthenticated, "%q", value)
		}
		return story(number, request, stream)
	}, WithToken("abc"), AllowPlaintextToken())
	if _, err := client.Complete(context.Background(), Text("?")); err != nil {
		t.Error(err)
	}
}

func TestMistakesInOptions(t *testing.T) {
	own := WithTransportCredentials(credentials.NewTLS(nil))
	for remedy, options := range map[string][]Option{
		"add WithTLS":         {WithToken("abc")},
		"without a newline":   {WithTLS(""), WithToken("abc\n")},
		"give the token":      {WithTLS(""), WithToken("")},
		"give one of them":    {own, WithTLS("")},
		"give both":           {WithClientCertificate("cert.pem", "")},
		"give a time to wait": {WithTimeout(-1)},
		"missing.pem":         {WithTLS("missing.pem")},
		"give one in PEM":     {WithTLS("go.mod")},
		`"go.mod"`:            {WithClientCertificate("go.mod", "go.mod")},
	} {
		if _, err := NewClient("", options...); err == nil || !strings.Contains(err.Error(), remedy) {
			t.Errorf("%s: %v", remedy, err)
		}
	}
}

func TestMistakesInSettings(t *testing.T) {
	client, err := NewClient("")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_, tools := client.Complete(context.Background(), Text("?"), Tools("{}"))
	_, parameters := client.CompleteChat(context.Background(), []*hsrpcv1.Message{User("?")},
		TemplateParameters(map[string]interface{}{"now": time.Now()}))
	for field, err := range map[string]error{"chat.tools": tools, "chat.template_parameters": parameters} {
		if failure := FromError(err); failure == nil || len(failure.Fields) != 1 || failure.Fields[0].Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestSettings(t *testing.T) {
	var got *hsrpcv1.GenerateRequest
	_, client := serve(t, func(
		number int, request *hsrpcv1.GenerateRequest, stream hsrpcv1.GenerationService_GenerateServer,
	) error {
		got = request
		return story(number, request, stream)
	})
	for _, test := range []struct {
		stream   func(...Setting) *Stream
		settings []Setting
		expected string
	}{
		{
			func(s ...Setting) *Stream { return client.Generate(context.Background(), Text("?"), s...) },
			[]Setting{
				RequestID("id"), Model("m"), Priority(3), NoSpecialTokens(), PlainText(), JSONSchema("{}"), CacheSalt("4"),
				Temperature(0), TopP(0.1), TopK(2), MinP(0.3), RepetitionPenalty(0.4), PresencePenalty(0.5),
				FrequencyPenalty(0.6), Seed(7), LogitBias(map[int32]float64{8: 0.9}),
				MaxTokens(10), MinTokens(11), Stop("12"), StopTokenIDs(13), IgnoreEOS(), IncludeStop(),
				TimeLimit(14 * time.Second), Logprobs(15), EchoPrompt(), ReturnTokenIDs(), MaxTokensPerMessage(16),
				MaxMessageDelay(17 * time.Second), ShowSpecialTokens(), PromptLogprobs(18),
			},
			`{"text": "?", "requestId": "id", "model": "m", "priority": 3,
				"constraint": {"jsonSchema": "{}"}, "cacheSalt": "4",
				"textOptions": {"addSpecialTokens": false, "parseSpecial": false},
				"sampling": {"temperature": 0, "topP": 0.1, "topK": 2, "minP": 0.3, "repetitionPenalty": 0.4,
					"presencePenalty": 0.5, "frequencyPenalty": 0.6, "seed": "7", "logitBias": {"8": 0.9}},
				"stopping": {"maxTokens": 10, "minTokens": 11, "stop": ["12"], "stopTokenIds": [13],
					"ignoreEos": true, "includeStop": true, "timeLimit": "14s"},
				"output": {"logprobs": 15, "echoPrompt": true, "returnTokenIds": true, "maxTokensPerMessage": 16,
					"maxMessageDelay": "17s", "skipSpecialTokens": false, "promptLogprobs": 18}}`,
		},
		{
			func(s ...Setting) *Stream {
				messages := []*hsrpcv1.Message{System("a"), User(""), Assistant("c")}
				return client.Chat(context.Background(), messages, s...)
			},
			[]Setting{
				Tools("{}"), ContinueFinalMessage(), TemplateParameters(map[string]interface{}{"think": true}),
			},
			`{"chat": {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": ""},
				{"role": "assistant", "content": "c"}],
				"tools": ["{}"], "continueFinalMessage": true, "templateParameters": {"think": true}}}`,
		},
		{
			func(s ...Setting) *Stream { return client.Generate(context.Background(), TokenIDs{1, 2}, s...) },
			nil,
			`{"tokenIds": {"ids": [1, 2]}}`,
		},
	} {
		want := &hsrpcv1.GenerateRequest{}
		if err := protojson.Unmarshal([]byte(test.expected), want); err != nil {
			t.Fatal(err)
		}
		if _, err := test.stream(test.settings...).completion(); err != nil || !proto.Equal(got, want) {
			t.Errorf("%v, %v", got, err)
		}
	}
}

func TestTargets(t *testing.T) {
	for given, expected := range map[string]string{
		"":                 "dns:///localhost:50051",
		"gpu1:50051":       "dns:///gpu1:50051",
		"[::1]:50051":      "dns:///[::1]:50051",
		"dns:///gpu1:1":    "dns:///gpu1:1",
		"unix:/run/socket": "unix:/run/socket",
		"consul://a/b":     "consul://a/b",
	} {
		if resolvable(given) != expected {
			t.Errorf("%q: %q", given, resolvable(given))
		}
	}
}
