package hsrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error is a call that ended with a status other than OK. Get it with errors.As:
//
//	var failure *hsrpc.Error
//	if errors.As(err, &failure) && failure.Reason == "MODEL_NOT_FOUND" {
//
// It is context.Canceled and context.DeadlineExceeded to errors.Is where its code says so.
type Error struct {
	// Code is the status; Message says in words what is wrong, and what helps.
	Code    codes.Code
	Message string
	// Fields are those of the request that are wrong.
	Fields []FieldViolation
	// RetryDelay is how long to wait before another try; 0: the server did not say.
	RetryDelay time.Duration
	// Reason is to switch on, in Domain, which is "hsrpc"; "": the server gave none.
	Reason   string
	Domain   string
	Metadata map[string]string

	status *status.Status
}

// FieldViolation says what is wrong with a field of a request, which it names by its path.
type FieldViolation struct {
	Field       string
	Description string
}

// Error names the code and says what is wrong.
func (e *Error) Error() string {
	return fmt.Sprintf("hsrpc: %v: %s", e.Code, e.Message)
}

// GRPCStatus is for the package status of gRPC.
func (e *Error) GRPCStatus() *status.Status {
	return e.status
}

// Is has the errors of the package context stand for their codes.
func (e *Error) Is(target error) bool {
	return target == context.Canceled && e.Code == codes.Canceled ||
		target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded
}

// FromError is the *Error in err. One that has none is of code Unknown; nil is nil.
func FromError(err error) *Error {
	if err == nil {
		return nil
	}
	var failure *Error
	if errors.As(err, &failure) {
		return failure
	}
	return fromStatus(status.Convert(err))
}

func fromStatus(from *status.Status) *Error {
	failure := &Error{Code: from.Code(), Message: from.Message(), status: from}
	for _, detail := range from.Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				failure.Fields = append(failure.Fields, FieldViolation{violation.GetField(), violation.GetDescription()})
			}
		case *errdetails.RetryInfo:
			failure.RetryDelay = detail.GetRetryDelay().AsDuration()
		case *errdetails.ErrorInfo:
			failure.Reason, failure.Domain, failure.Metadata = detail.GetReason(), detail.GetDomain(), detail.GetMetadata()
		}
	}
	return failure
}

// invalid is an error that needed no server to be found.
func invalid(field, format string, arguments ...interface{}) *Error {
	description := fmt.Sprintf(format, arguments...)
	failure := fromStatus(status.New(codes.InvalidArgument, field+": "+description))
	failure.Fields = []FieldViolation{{field, description}}
	return failure
}

// typed makes an *Error of what gRPC returns; nil and io.EOF are no errors of a call.
func typed(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return FromError(err)
}
