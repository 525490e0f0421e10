/// \file
/// A client of hsrpc's gRPC service. Requests and responses are the messages of proto/hsrpc/v1, whose comments say what
/// each field does; nothing of gRPC but its status codes is seen here.

#ifndef HSRPC_CLIENT_H_
#define HSRPC_CLIENT_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "hsrpc/error.h"
#include "hsrpc/v1/generation.pb.h"
#include "hsrpc/v1/model.pb.h"
#include "hsrpc/v1/prompt.pb.h"
#include "hsrpc/v1/server.pb.h"

namespace hsrpc {

/// PEM files for TLS; an empty name stands for none.
struct Tls {
  /// Roots that the server's certificate must come from. Default: those that gRPC finds on the system.
  std::string ca_file;
  /// The client's own certificate, for servers that ask for one; only with `key_file`.
  std::string cert_file;
  /// Its private key.
  std::string key_file;
};

/// Arguments of a gRPC channel by name, such as `grpc.ssl_target_name_override`.
using ChannelArguments = std::map<std::string, std::variant<int, std::string>>;

/// How a client reaches its server.
struct ClientOptions {
  /// TLS. Default: nothing is encrypted.
  std::optional<Tls> tls;
  /// Sent with every call as `authorization: Bearer TOKEN`; without TLS it travels in the clear. Default: none.
  std::optional<std::string> token;
  /// The deadline of a call that has no `timeout` of its own, counted from its start. Default: none.
  std::optional<std::chrono::milliseconds> timeout;
  /// Arguments of the channel, in place of the client's own of the same names.
  ChannelArguments channel_arguments;
};

/// What belongs to one call.
struct CallOptions {
  /// Time from its start after which the call ends with DEADLINE_EXCEEDED. Default: the client's.
  std::optional<std::chrono::milliseconds> timeout;
  /// Metadata to send, such as `x-hsrpc-client`; names in lower case, values of printable ASCII, or of any bytes where
  /// the name ends with `-bin`.
  std::multimap<std::string, std::string> metadata;
};

/// The whole output of a request.
struct Completion {
  /// Facts about the prompt, and the settings in effect.
  v1::Start start;
  std::string text;
  /// Only with `output.return_token_ids`.
  std::vector<std::int32_t> token_ids;
  /// Only with `output.logprobs`.
  std::vector<v1::TokenLogprob> logprobs;
  /// Only with `output.prompt_logprobs`: one for each token of the prompt but the first.
  std::vector<v1::TokenLogprob> prompt_logprobs;
  /// Why the output ended, and the counts of tokens.
  v1::Finish finish;
};

/// Deltas of one request as they come: `for (const auto& delta : stream)`. The texts of all of them, one after the
/// other, are the output.
///
/// Destroying it cancels the call, and the server stops the work; so does leaving the loop, where the stream is a
/// temporary of the loop. It may outlive its client. One thread at a time may use it; `cancel()` alone may be called by
/// any thread meanwhile. What it was moved from can be destroyed or assigned to, and nothing else.
class Stream {
 public:
  class iterator;

  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  ~Stream();

  /// Waits for the next delta, so that a second loop goes on where the first one was left.
  /// \throws Error the call did not end well; `operator++` of the iterator throws likewise
  iterator begin();
  iterator end() noexcept;

  /// Ends the call; who iterates gets an `Error` with CANCELLED. Does nothing to one that has ended.
  void cancel() noexcept;

  /// Facts about the prompt, and the settings in effect; null before the first delta.
  const v1::Start* start() const noexcept;
  /// How the request ended; null before the last delta.
  const v1::Finish* finish() const noexcept;

 private:
  friend class Client;
  class Call;

  explicit Stream(std::unique_ptr<Call> call) noexcept;

  std::unique_ptr<Call> call_;
};

/// An input iterator. It stays valid when its stream is moved; a delta is valid until the next one is read.
class Stream::iterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = v1::Delta;
  using difference_type = std::ptrdiff_t;
  using pointer = const v1::Delta*;
  using reference = const v1::Delta&;

  /// What `*iterator++` gives: a copy of the delta that was current.
  class Kept {
   public:
    explicit Kept(v1::Delta delta) : delta_(std::move(delta)) {}
    const v1::Delta& operator*() const noexcept { return delta_; }

   private:
    v1::Delta delta_;
  };

  iterator() noexcept = default;

  reference operator*() const noexcept;
  pointer operator->() const noexcept { return &**this; }
  iterator& operator++();
  Kept operator++(int);

  friend bool operator==(const iterator& left, const iterator& right) noexcept { return left.call_ == right.call_; }
  friend bool operator!=(const iterator& left, const iterator& right) noexcept { return left.call_ != right.call_; }

 private:
  friend class Stream;

  /// Reads the first delta.
  explicit iterator(Call* call);

  Call* call_ = nullptr;  // null at the end
};

/// Calls a server. All methods may be called by any number of threads at once. Making one neither connects nor waits.
///
/// A call that finds the server unavailable or its queue full is made again, up to four times, after the delay that the
/// server names, as long as nothing of the answer has come. Calls go to all addresses of the target in turn.
///
/// Every method that waits throws Error where the call does not end well, and every one std::invalid_argument where its
/// CallOptions cannot be. `generate` and `chat` do not wait.
class Client {
 public:
  /// \param target `host:port`, or a name as gRPC takes them, such as `dns:///host:port`
  /// \throws std::invalid_argument the options contradict each other, or one has no valid value
  /// \throws std::system_error a file cannot be read
  explicit Client(const std::string& target, const ClientOptions& options = {});

  /// Calls that run go on; streams may outlive the client.
  ~Client();
  Client(Client&& other) noexcept;
  Client& operator=(Client&& other) noexcept;

  /// Starts a request with text. `settings` are the request's fields other than its input.
  Stream generate(const std::string& prompt, v1::GenerateRequest settings = {}, const CallOptions& options = {});
  /// Starts a request as it is, with text, token ids or a conversation.
  Stream generate(const v1::GenerateRequest& request, const CallOptions& options = {});
  /// Starts a request with a conversation, see `message()`. The tools and parameters of `settings.chat` stay.
  Stream chat(const std::vector<v1::Message>& messages, v1::GenerateRequest settings = {},
              const CallOptions& options = {});

  /// As `generate`, but waits for the whole output.
  Completion complete(const std::string& prompt, v1::GenerateRequest settings = {}, const CallOptions& options = {});
  /// As `generate`, but waits for the whole output.
  Completion complete(const v1::GenerateRequest& request, const CallOptions& options = {});
  /// As `chat`, but waits for the whole output.
  Completion complete_chat(const std::vector<v1::Message>& messages, v1::GenerateRequest settings = {},
                           const CallOptions& options = {});

  /// Ends a live request, whose id is in `Start`; false if there is none of that id.
  bool abort(const std::string& request_id, const CallOptions& options = {});

  v1::GetModelResponse get_model(const v1::GetModelRequest& request = {}, const CallOptions& options = {});
  v1::TokenizeResponse tokenize(const v1::TokenizeRequest& request, const CallOptions& options = {});
  v1::DetokenizeResponse detokenize(const v1::DetokenizeRequest& request, const CallOptions& options = {});
  /// What the server was planned for, what was measured, and its load.
  v1::GetServerInfoResponse get_server_info(const CallOptions& options = {});

  /// Returns once the server has loaded its model; throws the last call's Error if it has not within `timeout`.
  void wait_ready(std::chrono::milliseconds timeout);

 private:
  class Connection;

  std::unique_ptr<Connection> connection_;
};

/// A message of a conversation.
/// \param role `system`, `developer`, `user`, `assistant` or `tool`
v1::Message message(const std::string& role, const std::string& content);

}  // namespace hsrpc

#endif  // HSRPC_CLIENT_H_
