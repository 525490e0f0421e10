/// \file
/// The exception of a call that did not end well.

#ifndef HSRPC_ERROR_H_
#define HSRPC_ERROR_H_

#include <grpcpp/support/status_code_enum.h>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace hsrpc {

/// What is wrong with one field of a request.
struct FieldViolation {
  /// Path of the field, such as `sampling.temperature`.
  std::string field;
  /// What is wrong with it, and what to do.
  std::string description;
};

/// A call that ended with a status other than OK; `what()` is its code and its message.
///
/// Copies share what they hold, so that copying throws nothing.
class Error : public std::runtime_error {
 public:
  /// \param details bytes of a `google.rpc.Status`, as in the trailer `grpc-status-details-bin`; what is no such
  ///   message is ignored
  Error(grpc::StatusCode code, const std::string& message, const std::string& details = {});

  grpc::StatusCode code() const noexcept;
  /// The server's words, or gRPC's own where no server was reached.
  const std::string& message() const noexcept;
  /// The fields that are wrong (`BadRequest`); none unless the code is INVALID_ARGUMENT or UNIMPLEMENTED.
  const std::vector<FieldViolation>& fields() const noexcept;
  /// When to try again (`RetryInfo`). The client has tried several times by then.
  std::optional<std::chrono::nanoseconds> retry_delay() const noexcept;
  /// A word in capitals to switch on (`ErrorInfo`), such as `MODEL_NOT_FOUND`; empty: none.
  const std::string& reason() const noexcept;
  /// Who gave the reason: `hsrpc`; empty: nobody.
  const std::string& domain() const noexcept;
  /// What belongs to the reason, such as `error_id`.
  const std::map<std::string, std::string>& metadata() const noexcept;

 private:
  struct Content;
  std::shared_ptr<const Content> content_;
};

/// Name of a code, such as `INVALID_ARGUMENT`.
const char* code_name(grpc::StatusCode code) noexcept;

}  // namespace hsrpc

#endif  // HSRPC_ERROR_H_
