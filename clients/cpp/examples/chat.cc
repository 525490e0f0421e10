// Talks to a model, turn by turn: chat [HOST:PORT]. HSRPC_TOKEN is a token, HSRPC_TLS_CA a file of roots.

#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "hsrpc/client.h"

namespace {

hsrpc::ClientOptions options_of_environment() {
  hsrpc::ClientOptions options;
  if (const char* token = std::getenv("HSRPC_TOKEN")) options.token = token;
  if (const char* ca_file = std::getenv("HSRPC_TLS_CA")) options.tls = hsrpc::Tls{ca_file, {}, {}};
  return options;
}

/// Prints the answer as it comes.
std::string answer(hsrpc::Client* client, const std::vector<hsrpc::v1::Message>& messages) {
  hsrpc::v1::GenerateRequest settings;
  settings.mutable_stopping()->set_max_tokens(256);
  hsrpc::Stream stream = client->chat(messages, settings);
  std::string text;
  for (const auto& delta : stream) {
    std::cout << delta.text() << std::flush;
    text += delta.text();
  }
  std::cout << "\n[" << stream.finish()->usage().completion_tokens() << " tokens]" << std::endl;
  return text;
}

void report(const hsrpc::Error& error) {
  std::cerr << error.what() << std::endl;
  for (const auto& violation : error.fields()) std::cerr << violation.field << ": " << violation.description << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    hsrpc::Client client(argc > 1 ? argv[1] : "localhost:50051", options_of_environment());
    std::vector<hsrpc::v1::Message> messages;
    for (std::string line; std::cout << "> " << std::flush && std::getline(std::cin, line);) {
      messages.push_back(hsrpc::message("user", line));
      messages.push_back(hsrpc::message("assistant", answer(&client, messages)));
    }
  } catch (const hsrpc::Error& error) {
    report(error);
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
