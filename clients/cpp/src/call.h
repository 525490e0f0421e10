#ifndef HSRPC_SRC_CALL_H_
#define HSRPC_SRC_CALL_H_

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/support/async_stream.h>
#include <grpcpp/support/status.h>

#include <memory>
#include <optional>

#include "hsrpc/client.h"
#include "hsrpc/v1/generation.grpc.pb.h"

namespace hsrpc {

/// \throws Error the status is not OK
void check(const grpc::Status& status);

/// One call of Generate: gRPC's asynchronous reader, each operation of which is waited for before the next one, since
/// the synchronous one waits for a connection when it is made, and could not be cancelled until then.
class Stream::Call {
 public:
  /// Starts the call, and waits for nothing. The context has its deadline and metadata already.
  Call(v1::GenerationService::Stub* stub, std::unique_ptr<grpc::ClientContext> context,
       const v1::GenerateRequest& request);
  /// Cancels the call, and waits until gRPC has let go of it.
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  /// Reads up to the next response with a delta; false at the good end.
  /// \throws Error the call did not end well, also each time after that
  bool next();
  void cancel() noexcept { context_->TryCancel(); }

  const v1::Delta& delta() const noexcept { return response_.delta(); }
  const v1::Start* start() const noexcept { return start_ ? &*start_ : nullptr; }
  const v1::Finish* finish() const noexcept { return finish_ ? &*finish_ : nullptr; }

 private:
  bool read();
  bool wait();
  grpc::Status end();

  std::unique_ptr<grpc::ClientContext> context_;
  grpc::CompletionQueue queue_;  // holds one operation at most, except while a started call ends
  std::unique_ptr<grpc::ClientAsyncReader<v1::GenerateResponse>> reader_;
  bool sent_ = false;  // the operation that sends the request has been waited for
  v1::GenerateResponse response_;
  std::optional<v1::Start> start_;
  std::optional<v1::Finish> finish_;
  std::optional<grpc::Status> status_;  // from the end of the call on
};

}  // namespace hsrpc

#endif  // HSRPC_SRC_CALL_H_
