#include "hsrpc/error.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "hsrpc/rpc/error_details.pb.h"
#include "hsrpc/rpc/status.pb.h"

namespace hsrpc {
namespace {

constexpr std::array<const char*, 17> kNames = {
    "OK",        "CANCELLED",       "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS",  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",    "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED",
};

/// Reads `detail` if it is a `google.rpc.NAME`. The messages here are copies of Google's with another package's name,
/// which the type's URL does not know of; see cmake/GenerateStubs.cmake.
template <typename Message>
bool unpack(const google::protobuf::Any& detail, const std::string& name, Message* message) {
  const std::string& url = detail.type_url();
  return url.substr(url.rfind('/') + 1) == "google.rpc." + name && message->ParseFromString(detail.value());
}

std::chrono::nanoseconds duration(const google::protobuf::Duration& delay) {
  return std::chrono::seconds(delay.seconds()) + std::chrono::nanoseconds(delay.nanos());
}

}  // namespace

struct Error::Content {
  grpc::StatusCode code;
  std::string message;
  std::vector<FieldViolation> fields;
  std::optional<std::chrono::nanoseconds> retry_delay;
  std::string reason;
  std::string domain;
  std::map<std::string, std::string> metadata;

  void read(const google::protobuf::Any& detail) {
    rpc::BadRequest bad;
    rpc::ErrorInfo info;
    rpc::RetryInfo retry;
    if (unpack(detail, "BadRequest", &bad)) {
      for (const auto& violation : bad.field_violations()) {
        fields.push_back({violation.field(), violation.description()});
      }
    } else if (unpack(detail, "ErrorInfo", &info)) {
      reason = info.reason();
      domain = info.domain();
      metadata = {info.metadata().begin(), info.metadata().end()};
    } else if (unpack(detail, "RetryInfo", &retry)) {
      retry_delay = duration(retry.retry_delay());
    }
  }
};

Error::Error(grpc::StatusCode code, const std::string& message, const std::string& details)
    : std::runtime_error(std::string(code_name(code)) + ": " + message) {
  auto content = std::make_shared<Content>();
  content->code = code;
  content->message = message;
  rpc::Status status;
  if (status.ParseFromString(details)) {
    for (const auto& detail : status.details()) content->read(detail);
  }
  content_ = std::move(content);
}

grpc::StatusCode Error::code() const noexcept { return content_->code; }
const std::string& Error::message() const noexcept { return content_->message; }
const std::vector<FieldViolation>& Error::fields() const noexcept { return content_->fields; }
std::optional<std::chrono::nanoseconds> Error::retry_delay() const noexcept { return content_->retry_delay; }
const std::string& Error::reason() const noexcept { return content_->reason; }
const std::string& Error::domain() const noexcept { return content_->domain; }
const std::map<std::string, std::string>& Error::metadata() const noexcept { return content_->metadata; }

const char* code_name(grpc::StatusCode code) noexcept {
  const auto number = static_cast<std::size_t>(code);
  return number < kNames.size() ? kNames[number] : "UNKNOWN";
}

}  // namespace hsrpc
