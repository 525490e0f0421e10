#ifndef HSRPC_SRC_CHANNEL_H_
#define HSRPC_SRC_CHANNEL_H_

#include <grpcpp/channel.h>

#include <memory>
#include <string>

#include "hsrpc/client.h"

namespace hsrpc {

/// A channel to `target`. The files are read now.
/// \throws std::invalid_argument, std::system_error as Client's constructor
std::shared_ptr<grpc::Channel> make_channel(const std::string& target, const ClientOptions& options);

/// Whether `target` is on this machine, where no proxy can reach it.
bool is_loopback(const std::string& target);

/// \throws std::invalid_argument gRPC would end the process for it
void check_metadata(const std::string& name, const std::string& value);

/// \throws std::invalid_argument it is negative, or more than clocks can count
void check_timeout(std::chrono::milliseconds timeout);

}  // namespace hsrpc

#endif  // HSRPC_SRC_CHANNEL_H_
