#include <utility>

#include "call.h"

namespace hsrpc {

void check(const grpc::Status& status) {
  if (!status.ok()) throw Error(status.error_code(), status.error_message(), status.error_details());
}

Stream::Call::Call(v1::GenerationService::Stub* stub, std::unique_ptr<grpc::ClientContext> context,
                   const v1::GenerateRequest& request)
    : context_(std::move(context)), reader_(stub->PrepareAsyncGenerate(context_.get(), request, &queue_)) {
  reader_->StartCall(this);
}

Stream::Call::~Call() {
  if (!status_) {
    cancel();
    end();
  }
}

bool Stream::Call::next() {
  while (!status_) {
    if (read() && response_.has_delta()) return true;
  }
  check(*status_);
  return false;
}

/// Reads a response, or the status that ends the call.
bool Stream::Call::read() {
  if (!sent_) sent_ = wait();
  if (sent_) reader_->Read(&response_, this);
  if (!sent_ || !wait()) {
    status_ = end();
    if (status_->ok() && !finish_) status_.emplace(grpc::DATA_LOSS, "the stream ended before its last response");
    return false;
  }
  if (response_.has_start()) start_ = std::move(*response_.mutable_start());
  if (response_.has_finish()) finish_ = std::move(*response_.mutable_finish());
  return true;
}

/// Waits for an operation; false: it failed, as all will do from then on but the one that asks for the status.
bool Stream::Call::wait() {
  void* tag = nullptr;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

/// Waits for the status, and for the request to be sent or given up, if that is still going on.
grpc::Status Stream::Call::end() {
  grpc::Status status;
  reader_->Finish(&status, this);
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) continue;
  return status;
}

Stream::Stream(std::unique_ptr<Call> call) noexcept : call_(std::move(call)) {}
Stream::Stream(Stream&& other) noexcept = default;
Stream& Stream::operator=(Stream&& other) noexcept = default;
Stream::~Stream() = default;

Stream::iterator Stream::begin() { return iterator(call_.get()); }
Stream::iterator Stream::end() noexcept { return {}; }
void Stream::cancel() noexcept { call_->cancel(); }
const v1::Start* Stream::start() const noexcept { return call_->start(); }
const v1::Finish* Stream::finish() const noexcept { return call_->finish(); }

Stream::iterator::iterator(Call* call) : call_(call) { ++*this; }

Stream::iterator::reference Stream::iterator::operator*() const noexcept { return call_->delta(); }

Stream::iterator& Stream::iterator::operator++() {
  if (!call_->next()) call_ = nullptr;
  return *this;
}

Stream::iterator::Kept Stream::iterator::operator++(int) {
  Kept kept(**this);
  ++*this;
  return kept;
}

}  // namespace hsrpc
