package hsrpc

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hsrpc/hsrpc/clients/go/hsrpcv1"
)

// Prompt is what a model continues: a Text or TokenIDs.
type Prompt interface {
	setInput(*hsrpcv1.GenerateRequest)
}

// Text is a prompt as text. A model that was trained on conversations expects Chat.
type Text string

// TokenIDs is a prompt as token ids, taken as they are.
type TokenIDs []int32

func (t Text) setInput(request *hsrpcv1.GenerateRequest) {
	request.Input = &hsrpcv1.GenerateRequest_Text{Text: string(t)}
}

func (t TokenIDs) setInput(request *hsrpcv1.GenerateRequest) {
	request.Input = &hsrpcv1.GenerateRequest_TokenIds{TokenIds: &hsrpcv1.TokenIds{Ids: t}}
}

// System is a message that tells the model how to behave.
func System(content string) *hsrpcv1.Message { return message("system", content) }

// User is a message of the one who asks.
func User(content string) *hsrpcv1.Message { return message("user", content) }

// Assistant is a message of the model's.
func Assistant(content string) *hsrpcv1.Message { return message("assistant", content) }

func message(role, content string) *hsrpcv1.Message {
	return &hsrpcv1.Message{Role: role, Content: &content}
}

// Setting changes a request before it is sent. What is not set takes the server's default, which the proto files name.
// A function of your own can set any field.
type Setting func(*hsrpcv1.GenerateRequest) error

// MaxTokens is the most output tokens.
func MaxTokens(count int32) Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.MaxTokens = &count })
}

// MinTokens is the number of output tokens before which end tokens are excluded.
func MinTokens(count int32) Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.MinTokens = &count })
}

// Stop ends the output before the first of these strings.
func Stop(texts ...string) Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.Stop = texts })
}

// StopTokenIDs ends the output at the first of these tokens.
func StopTokenIDs(ids ...int32) Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.StopTokenIds = ids })
}

// IgnoreEOS goes on past the tokens that end a text.
func IgnoreEOS() Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.IgnoreEos = yes() })
}

// IncludeStop keeps what ended the output in its text.
func IncludeStop() Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.IncludeStop = yes() })
}

// TimeLimit ends the output, without an error, that long after the request came.
func TimeLimit(limit time.Duration) Setting {
	return stopping(func(s *hsrpcv1.Stopping) { s.TimeLimit = durationpb.New(limit) })
}

// Temperature of 0 is greedy; it is in [0, 100].
func Temperature(value float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.Temperature = &value })
}

// TopP is the nucleus, in (0, 1].
func TopP(value float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.TopP = &value })
}

// TopK is the number of most probable tokens to choose from; 0 is all.
func TopK(count int32) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.TopK = &count })
}

// MinP is the least probability relative to the most probable token's, in [0, 1].
func MinP(value float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.MinP = &value })
}

// RepetitionPenalty divides the logits of tokens in prompt and output; in (0, 100].
func RepetitionPenalty(value float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.RepetitionPenalty = &value })
}

// PresencePenalty is subtracted once from the logits of tokens in the output; in [-2, 2].
func PresencePenalty(value float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.PresencePenalty = &value })
}

// FrequencyPenalty is subtracted for each time that a token is in the output; in [-2, 2].
func FrequencyPenalty(value float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.FrequencyPenalty = &value })
}

// Seed makes the same request give the same tokens; it is not negative.
func Seed(seed int64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.Seed = &seed })
}

// LogitBias is added to the logits of these token ids; in [-100, 100].
func LogitBias(bias map[int32]float64) Setting {
	return sampling(func(s *hsrpcv1.Sampling) { s.LogitBias = bias })
}

// Logprobs gives the logprob of each token, and those of this many of the most probable ones.
func Logprobs(count int32) Setting {
	return output(func(o *hsrpcv1.Output) { o.Logprobs = &count })
}

// PromptLogprobs gives the logprob of each token of the prompt but the first, and those of this many of the most probable
// ones in its place. With it MaxTokens may be 0: the prompt is scored, and nothing generated.
func PromptLogprobs(count int32) Setting {
	return output(func(o *hsrpcv1.Output) { o.PromptLogprobs = &count })
}

// EchoPrompt has the text begin with the prompt's.
func EchoPrompt() Setting {
	return output(func(o *hsrpcv1.Output) { o.EchoPrompt = yes() })
}

// ReturnTokenIDs gives the ids of the output's tokens, beside its text.
func ReturnTokenIDs() Setting {
	return output(func(o *hsrpcv1.Output) { o.ReturnTokenIds = yes() })
}

// MaxTokensPerMessage is the most tokens in one delta.
func MaxTokensPerMessage(count int32) Setting {
	return output(func(o *hsrpcv1.Output) { o.MaxTokensPerMessage = &count })
}

// MaxMessageDelay is how long tokens may wait for others, so that fewer messages are sent.
func MaxMessageDelay(delay time.Duration) Setting {
	return output(func(o *hsrpcv1.Output) { o.MaxMessageDelay = durationpb.New(delay) })
}

// ShowSpecialTokens leaves special tokens in the text, such as those that mark calls of tools.
func ShowSpecialTokens() Setting {
	return output(func(o *hsrpcv1.Output) { o.SkipSpecialTokens = no() })
}

// JSONSchema lets the output be nothing but JSON of this schema.
func JSONSchema(schema string) Setting {
	return Constraint(&hsrpcv1.Constraint{Kind: &hsrpcv1.Constraint_JsonSchema{JsonSchema: schema}})
}

// Constraint lets the output be nothing but what it allows: a JSON Schema, any JSON object, a regular expression, a
// grammar, or a choice of texts.
func Constraint(constraint *hsrpcv1.Constraint) Setting {
	return set(func(r *hsrpcv1.GenerateRequest) { r.Constraint = constraint })
}

// CacheSalt is a secret of those who may share what the server keeps of equal first tokens.
func CacheSalt(salt string) Setting {
	return set(func(r *hsrpcv1.GenerateRequest) { r.CacheSalt = &salt })
}

// Priority lets a request in before those of a larger one.
func Priority(priority int32) Setting {
	return set(func(r *hsrpcv1.GenerateRequest) { r.Priority = &priority })
}

// RequestID names the request, for Abort and for logs.
func RequestID(id string) Setting {
	return set(func(r *hsrpcv1.GenerateRequest) { r.RequestId = &id })
}

// Model is the one that must answer.
func Model(name string) Setting {
	return set(func(r *hsrpcv1.GenerateRequest) { r.Model = &name })
}

// PlainText takes the text of special tokens in a Text as plain words, as words of people you do not trust should be.
func PlainText() Setting {
	return textOptions(func(t *hsrpcv1.TextOptions) { t.ParseSpecial = no() })
}

// NoSpecialTokens keeps the tokenizer from adding its special tokens to a Text.
func NoSpecialTokens() Setting {
	return textOptions(func(t *hsrpcv1.TextOptions) { t.AddSpecialTokens = no() })
}

// Tools are those that the model may call, each one JSON object, such as {"type": "function", "function": {...}}.
func Tools(tools ...string) Setting {
	return chat("tools", func(c *hsrpcv1.Chat) error { c.Tools = tools; return nil })
}

// ContinueFinalMessage has the output continue the last message of the conversation.
func ContinueFinalMessage() Setting {
	return chat("continue_final_message", func(c *hsrpcv1.Chat) error { c.ContinueFinalMessage = yes(); return nil })
}

// TemplateParameters are for the model's chat template, such as enable_thinking. Values are what JSON has.
func TemplateParameters(parameters map[string]interface{}) Setting {
	return chat("template_parameters", func(c *hsrpcv1.Chat) error {
		fields, err := structpb.NewStruct(parameters)
		if err != nil {
			return invalid("chat.template_parameters", "%v; give what JSON has", err)
		}
		c.TemplateParameters = fields
		return nil
	})
}

func set(change func(*hsrpcv1.GenerateRequest)) Setting {
	return func(request *hsrpcv1.GenerateRequest) error {
		change(request)
		return nil
	}
}

func sampling(change func(*hsrpcv1.Sampling)) Setting {
	return set(func(request *hsrpcv1.GenerateRequest) {
		if request.Sampling == nil {
			request.Sampling = &hsrpcv1.Sampling{}
		}
		change(request.Sampling)
	})
}

func stopping(change func(*hsrpcv1.Stopping)) Setting {
	return set(func(request *hsrpcv1.GenerateRequest) {
		if request.Stopping == nil {
			request.Stopping = &hsrpcv1.Stopping{}
		}
		change(request.Stopping)
	})
}

func output(change func(*hsrpcv1.Output)) Setting {
	return set(func(request *hsrpcv1.GenerateRequest) {
		if request.Output == nil {
			request.Output = &hsrpcv1.Output{}
		}
		change(request.Output)
	})
}

func textOptions(change func(*hsrpcv1.TextOptions)) Setting {
	return set(func(request *hsrpcv1.GenerateRequest) {
		if request.TextOptions == nil {
			request.TextOptions = &hsrpcv1.TextOptions{}
		}
		change(request.TextOptions)
	})
}

// chat refuses prompts that are no conversation, which would leave the setting without effect.
func chat(field string, change func(*hsrpcv1.Chat) error) Setting {
	return func(request *hsrpcv1.GenerateRequest) error {
		if request.GetChat() == nil {
			return invalid("chat."+field, "the prompt is no conversation; call Chat, or leave the setting out")
		}
		return change(request.GetChat())
	}
}

func yes() *bool { value := true; return &value }

func no() *bool { value := false; return &value }
