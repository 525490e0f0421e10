#include "channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <system_error>

namespace hsrpc {
namespace {

constexpr std::chrono::hours kLongestTimeout(24 * 365 * 30);

// A call is made again only while nothing of its answer has come; gRPC allows five attempts at most. Where the server
// names a delay (grpc-retry-pushback-ms), that one counts.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{}],
    "retryPolicy": {
      "maxAttempts": 5,
      "initialBackoff": "0.25s",
      "maxBackoff": "4s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    }
  }]
})";

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// The host in host:port, dns:///host:port, ipv4:host:port, ipv6:[host]:port and their like.
std::string host_of(const std::string& target) {
  std::string address = target.substr(target.rfind('/') + 1);
  for (const char* scheme : {"dns:", "ipv4:", "ipv6:"}) {
    if (starts_with(address, scheme)) address.erase(0, std::strlen(scheme));
  }
  if (starts_with(address, "[")) return address.substr(1, address.find(']') - 1);
  const auto colon = address.find(':');
  const bool has_port = colon != address.npos && colon == address.rfind(':');  // more colons are an address of IPv6
  return has_port ? address.substr(0, colon) : address;
}

ChannelArguments arguments(const std::string& target, const ClientOptions& options) {
  ChannelArguments all = options.channel_arguments;
  const ChannelArguments defaults = {
      {"grpc.service_config", kServiceConfig},
      // A call keeps what it has sent for the next attempt; a server takes requests of 4 MiB unless told otherwise.
      {"grpc.per_rpc_retry_buffer_size", 16 * 1024 * 1024},
      // Below the time that the retries take together, so that a server that comes back is found by one of them.
      {"grpc.initial_reconnect_backoff_ms", 200},
      {"grpc.max_reconnect_backoff_ms", 2000},
      // The server allows a ping each 10 s. While a request waits in the queue nothing else is sent.
      {"grpc.keepalive_time_ms", 30'000},
      {"grpc.keepalive_timeout_ms", 10'000},
      {"grpc.http2.max_pings_without_data", 0},
      // What comes was asked for: the echo of a prompt can be longer than gRPC's 4 MiB.
      {"grpc.max_receive_message_length", -1},
  };
  all.insert(defaults.begin(), defaults.end());
  if (is_loopback(target)) all.emplace("grpc.enable_http_proxy", 0);
  return all;
}

/// Content of a PEM file. An empty one would have gRPC trust the system's roots in place of those that were asked for.
std::string read(const std::string& name, const std::string& path) {
  if (path.empty()) return {};
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (file) content << file.rdbuf();
  if (content.tellp() > 0) return content.str();
  if (errno != 0) throw std::system_error(errno, std::generic_category(), name + ": cannot read " + path);
  throw std::invalid_argument(name + ": " + path + " is empty; give a PEM file");
}

std::shared_ptr<grpc::ChannelCredentials> tls_credentials(const Tls& tls) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    throw std::invalid_argument("cert_file, key_file: one without the other; give both, or neither");
  }
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = read("ca_file", tls.ca_file);
  options.pem_cert_chain = read("cert_file", tls.cert_file);
  options.pem_private_key = read("key_file", tls.key_file);
  return grpc::SslCredentials(options);
}

/// gRPC attaches credentials of calls to secure channels only; without TLS the client sends the token as metadata.
std::shared_ptr<grpc::ChannelCredentials> credentials(const ClientOptions& options) {
  if (!options.tls) return grpc::InsecureChannelCredentials();
  auto channel = tls_credentials(*options.tls);
  if (!options.token) return channel;
  return grpc::CompositeChannelCredentials(channel, grpc::AccessTokenCredentials(*options.token));
}

bool is_printable(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char each) { return ' ' <= each && each <= '~'; });
}

void check_token(const std::string& token) {
  if (token.empty() || !is_printable(token)) {
    throw std::invalid_argument("token: empty, or not printable ASCII; give the token alone, without a newline");
  }
}

}  // namespace

std::shared_ptr<grpc::Channel> make_channel(const std::string& target, const ClientOptions& options) {
  if (options.token) check_token(*options.token);
  if (options.timeout) check_timeout(*options.timeout);
  grpc::ChannelArguments all;
  for (const auto& [name, value] : arguments(target, options)) {
    if (const int* number = std::get_if<int>(&value)) {
      all.SetInt(name, *number);
    } else {
      all.SetString(name, std::get<std::string>(value));
    }
  }
  return grpc::CreateCustomChannel(target, credentials(options), all);
}

bool is_loopback(const std::string& target) {
  const std::string host = host_of(target);
  const bool is_dotted = host.find_first_not_of("0123456789.") == host.npos;
  return host == "localhost" || ends_with(host, ".localhost") || host == "::1" || host == "::" || host == "0.0.0.0" ||
         (is_dotted && starts_with(host, "127."));
}

void check_metadata(const std::string& name, const std::string& value) {
  if (name.empty() || name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-_.") != name.npos) {
    throw std::invalid_argument("metadata: " + name + " is no name; use lower-case letters, digits, - _ and .");
  }
  if (!ends_with(name, "-bin") && !is_printable(value)) {
    throw std::invalid_argument("metadata: the value of " + name +
                                " is not printable ASCII; other bytes need a name that ends with -bin");
  }
}

void check_timeout(std::chrono::milliseconds timeout) {
  if (timeout < timeout.zero() || timeout > kLongestTimeout) {
    throw std::invalid_argument("timeout: " + std::to_string(timeout.count()) +
                                " ms is no time to wait; give 0 to 30 years, or none");
  }
}

}  // namespace hsrpc
