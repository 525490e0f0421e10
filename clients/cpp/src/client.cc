#include "hsrpc/client.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "call.h"
#include "channel.h"
#include "hsrpc/v1/model.grpc.pb.h"
#include "hsrpc/v1/server.grpc.pb.h"

namespace hsrpc {
namespace {

constexpr std::chrono::milliseconds kPoll(200);

Completion gather(Stream stream) {
  Completion completion;
  for (const auto& delta : stream) {
    completion.text += delta.text();
    completion.token_ids.insert(completion.token_ids.end(), delta.token_ids().begin(), delta.token_ids().end());
    completion.logprobs.insert(completion.logprobs.end(), delta.logprobs().begin(), delta.logprobs().end());
    const auto& of_prompt = delta.prompt_logprobs();
    completion.prompt_logprobs.insert(completion.prompt_logprobs.end(), of_prompt.begin(), of_prompt.end());
  }
  if (stream.start()) completion.start = *stream.start();
  completion.finish = *stream.finish();
  return completion;
}

v1::GenerateRequest with_text(v1::GenerateRequest settings, const std::string& text) {
  settings.set_text(text);
  return settings;
}

v1::GenerateRequest with_messages(v1::GenerateRequest settings, const std::vector<v1::Message>& messages) {
  *settings.mutable_chat()->mutable_messages() = {messages.begin(), messages.end()};
  return settings;
}

}  // namespace

/// The channel with the stubs of its services, and what every call over it brings along.
class Client::Connection {
 public:
  Connection(const std::string& target, const ClientOptions& options)
      : Connection(make_channel(target, options), options) {}

  v1::GenerationService::Stub generation;
  v1::ModelService::Stub model;
  v1::ServerService::Stub server;

  std::unique_ptr<grpc::ClientContext> context(const CallOptions& options) const {
    auto context = std::make_unique<grpc::ClientContext>();
    if (const auto timeout = options.timeout ? options.timeout : timeout_) {
      check_timeout(*timeout);
      context->set_deadline(std::chrono::system_clock::now() + *timeout);
    }
    for (const auto& [name, value] : options.metadata) {
      check_metadata(name, value);
      context->AddMetadata(name, value);
    }
    if (plain_token_) context->AddMetadata("authorization", "Bearer " + *plain_token_);
    return context;
  }

  /// Calls `method` of `stub` and waits for its response.
  template <typename Stub, typename Request, typename Response>
  Response call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                const Request& request, const CallOptions& options) const {
    Response response;
    check((stub->*method)(context(options).get(), request, &response));
    return response;
  }

 private:
  Connection(const std::shared_ptr<grpc::Channel>& channel, const ClientOptions& options)
      : generation(channel), model(channel), server(channel), timeout_(options.timeout) {
    if (!options.tls) plain_token_ = options.token;  // with TLS the channel brings it
  }

  std::optional<std::chrono::milliseconds> timeout_;
  std::optional<std::string> plain_token_;
};

Client::Client(const std::string& target, const ClientOptions& options)
    : connection_(std::make_unique<Connection>(target, options)) {}
Client::~Client() = default;
Client::Client(Client&& other) noexcept = default;
Client& Client::operator=(Client&& other) noexcept = default;

Stream Client::generate(const std::string& prompt, v1::GenerateRequest settings, const CallOptions& options) {
  return generate(with_text(std::move(settings), prompt), options);
}

Stream Client::generate(const v1::GenerateRequest& request, const CallOptions& options) {
  return Stream(std::make_unique<Stream::Call>(&connection_->generation, connection_->context(options), request));
}

Stream Client::chat(const std::vector<v1::Message>& messages, v1::GenerateRequest settings,
                    const CallOptions& options) {
  return generate(with_messages(std::move(settings), messages), options);
}

Completion Client::complete(const std::string& prompt, v1::GenerateRequest settings, const CallOptions& options) {
  return gather(generate(prompt, std::move(settings), options));
}

Completion Client::complete(const v1::GenerateRequest& request, const CallOptions& options) {
  return gather(generate(request, options));
}

Completion Client::complete_chat(const std::vector<v1::Message>& messages, v1::GenerateRequest settings,
                                 const CallOptions& options) {
  return gather(chat(messages, std::move(settings), options));
}

bool Client::abort(const std::string& request_id, const CallOptions& options) {
  v1::AbortRequest request;
  request.set_request_id(request_id);
  return connection_->call(&connection_->generation, &v1::GenerationService::Stub::Abort, request, options).aborted();
}

v1::GetModelResponse Client::get_model(const v1::GetModelRequest& request, const CallOptions& options) {
  return connection_->call(&connection_->model, &v1::ModelService::Stub::GetModel, request, options);
}

v1::TokenizeResponse Client::tokenize(const v1::TokenizeRequest& request, const CallOptions& options) {
  return connection_->call(&connection_->model, &v1::ModelService::Stub::Tokenize, request, options);
}

v1::DetokenizeResponse Client::detokenize(const v1::DetokenizeRequest& request, const CallOptions& options) {
  return connection_->call(&connection_->model, &v1::ModelService::Stub::Detokenize, request, options);
}

v1::GetServerInfoResponse Client::get_server_info(const CallOptions& options) {
  return connection_->call(&connection_->server, &v1::ServerService::Stub::GetServerInfo, v1::GetServerInfoRequest(),
                           options);
}

void Client::wait_ready(std::chrono::milliseconds timeout) {
  check_timeout(timeout);
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (true) {
    try {
      get_model();
      return;
    } catch (const Error& error) {
      if (error.code() != grpc::StatusCode::UNAVAILABLE || std::chrono::steady_clock::now() > deadline) throw;
    }
    std::this_thread::sleep_for(kPoll);
  }
}

v1::Message message(const std::string& role, const std::string& content) {
  v1::Message message;
  message.set_role(role);
  message.set_content(content);
  return message;
}

}  // namespace hsrpc
