// Tests of what the conformance suite does not reach, against a server in this process.

#include <google/protobuf/descriptor.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <future>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "channel.h"
#include "hsrpc/client.h"
#include "hsrpc/rpc/error_details.pb.h"
#include "hsrpc/rpc/status.pb.h"
#include "hsrpc/v1/generation.grpc.pb.h"

namespace {

namespace v1 = hsrpc::v1;
using grpc::StatusCode;
using std::chrono::milliseconds;

int failures = 0;

#define CHECK(condition)                                                                    \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      ++failures;                                                                           \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << " does not hold\n"; \
    }                                                                                       \
  } while (false)

template <typename Exception>
bool throws(const std::function<void()>& action, const std::string& words) {
  try {
    action();
  } catch (const Exception& error) {
    return std::string(error.what()).find(words) != std::string::npos;
  }
  return false;
}

bool fails(const std::function<void()>& action, StatusCode code) {
  return throws<hsrpc::Error>(action, std::string(hsrpc::code_name(code)) + ": ");
}

/// What a server saw of a call.
struct Seen {
  v1::GenerateRequest request;
  std::multimap<std::string, std::string> metadata;
  std::chrono::system_clock::time_point deadline;
};

/// A server whose Generate is a function of the test's.
class Server final : public v1::GenerationService::Service {
 public:
  using Writer = grpc::ServerWriter<v1::GenerateResponse>;
  using Answer = std::function<grpc::Status(const v1::GenerateRequest&, Writer*)>;

  explicit Server(Answer answer) : answer_(std::move(answer)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~Server() override {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }
  int num_calls() const { return num_calls_; }
  /// Whether a call has been cancelled.
  bool cancelled() const { return cancelled_; }
  /// The last call.
  Seen seen() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }

 private:
  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request, Writer* writer) override {
    ++num_calls_;
    see(*context, *request);
    const grpc::Status status = answer_(*request, writer);
    if (context->IsCancelled()) cancelled_ = true;
    return status;
  }

  void see(const grpc::ServerContext& context, const v1::GenerateRequest& request) {
    Seen seen{request, {}, context.deadline()};
    for (const auto& [name, value] : context.client_metadata()) {
      seen.metadata.emplace(std::string(name.data(), name.size()), std::string(value.data(), value.size()));
    }
    const std::lock_guard lock(mutex_);
    seen_ = seen;
  }

  Answer answer_;
  int port_ = 0;
  std::atomic<int> num_calls_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  Seen seen_;
  std::unique_ptr<grpc::Server> server_;
};

bool write(Server::Writer* writer, const std::string& text, bool last = false) {
  v1::GenerateResponse response;
  response.mutable_start()->set_model("m");
  response.mutable_delta()->set_text(text);
  if (last) response.mutable_finish()->set_reason(v1::FINISH_REASON_EOS);
  return writer->Write(response);
}

/// Answers with the prompt's characters, one a delta.
grpc::Status spell(const v1::GenerateRequest& request, Server::Writer* writer) {
  const std::string& text = request.text();
  for (std::size_t i = 0; i < text.size(); ++i) write(writer, text.substr(i, 1), i + 1 == text.size());
  return grpc::Status::OK;
}

/// Answers without end.
grpc::Status babble(const v1::GenerateRequest&, Server::Writer* writer) {
  while (write(writer, "x")) continue;
  return grpc::Status::OK;
}

void add_detail(hsrpc::rpc::Status* status, const std::string& name, const google::protobuf::MessageLite& message) {
  auto* detail = status->add_details();
  detail->set_type_url("type.googleapis.com/google.rpc." + name);
  detail->set_value(message.SerializeAsString());
}

void test_errors_have_their_details() {
  hsrpc::rpc::BadRequest bad;
  auto* violation = bad.add_field_violations();
  violation->set_field("sampling.top_p");
  violation->set_description("2 is outside");
  hsrpc::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(1);
  retry.mutable_retry_delay()->set_nanos(500'000'000);
  hsrpc::rpc::ErrorInfo info;
  info.set_reason("LOADING");
  info.set_domain("hsrpc");
  (*info.mutable_metadata())["error_id"] = "7";
  hsrpc::rpc::Status status;
  add_detail(&status, "QuotaFailure", hsrpc::rpc::QuotaFailure());
  add_detail(&status, "BadRequest", bad);
  add_detail(&status, "RetryInfo", retry);
  add_detail(&status, "ErrorInfo", info);

  const hsrpc::Error error(StatusCode::UNAVAILABLE, "not now", status.SerializeAsString());
  CHECK(error.what() == std::string("UNAVAILABLE: not now"));
  CHECK(error.message() == "not now");
  CHECK(error.fields().size() == 1);
  CHECK(error.fields().at(0).field == "sampling.top_p" && error.fields().at(0).description == "2 is outside");
  CHECK(error.retry_delay() == milliseconds(1500));
  CHECK(error.reason() == "LOADING" && error.domain() == "hsrpc" && error.metadata().at("error_id") == "7");
}

void test_errors_without_details_are_errors_too() {
  for (const std::string details : {"", "no message of protobuf's"}) {
    const hsrpc::Error error(StatusCode::UNAUTHENTICATED, "who?", details);
    CHECK(error.code() == StatusCode::UNAUTHENTICATED);
    CHECK(error.fields().empty() && !error.retry_delay() && error.reason().empty() && error.metadata().empty());
  }
  CHECK(hsrpc::code_name(static_cast<StatusCode>(99)) == std::string("UNKNOWN"));
}

/// Whoever links the library may register them.
void test_descriptors_of_google_rpc_are_not_registered() {
  const auto* pool = google::protobuf::DescriptorPool::generated_pool();
  CHECK(pool->FindFileByName("hsrpc/v1/generation.proto") != nullptr);
  CHECK(pool->FindMessageTypeByName("google.rpc.Status") == nullptr);
  CHECK(pool->FindFileByName("google/rpc/status.proto") == nullptr);
  CHECK(pool->FindFileByName("google/rpc/error_details.proto") == nullptr);
}

hsrpc::ClientOptions with_token(const std::string& token) {
  hsrpc::ClientOptions options;
  options.token = token;
  return options;
}

hsrpc::ClientOptions with_tls(const hsrpc::Tls& tls) {
  hsrpc::ClientOptions options;
  options.tls = tls;
  return options;
}

hsrpc::ClientOptions with_timeout(milliseconds timeout) {
  hsrpc::ClientOptions options;
  options.timeout = timeout;
  return options;
}

void test_options_are_checked() {
  const auto make = [](const hsrpc::ClientOptions& options) {
    return [options] { hsrpc::Client client("localhost:1", options); };
  };
  for (const std::string token : {"", "two\nlines", "t\xc3\xb6ken"}) {
    CHECK(throws<std::invalid_argument>(make(with_token(token)), "token: empty, or not printable ASCII"));
  }
  CHECK(throws<std::invalid_argument>(make(with_tls({"", "cert.pem", ""})), "cert_file, key_file: one without"));
  CHECK(throws<std::invalid_argument>(make(with_tls({"", "", "key.pem"})), "cert_file, key_file: one without"));
  CHECK(throws<std::system_error>(make(with_tls({"/no/such.pem", "", ""})), "ca_file: cannot read /no/such.pem: No"));
  CHECK(throws<std::system_error>(make(with_tls({"/", "", ""})), "ca_file: cannot read /: Is a directory"));
  CHECK(throws<std::invalid_argument>(make(with_tls({"/dev/null", "", ""})), "ca_file: /dev/null is empty"));
  CHECK(throws<std::invalid_argument>(make(with_timeout(milliseconds(-1))), "timeout: -1 ms"));
  CHECK(throws<std::invalid_argument>(make(with_timeout(milliseconds::max())), "ms is no time to wait"));
  make(with_tls({}))();  // the system's roots
}

void test_loopback_is_known_by_its_names() {
  for (const char* target :
       {"localhost", "localhost:1", "dns:///localhost:1", "dns:a.localhost:1", "127.0.0.1:1", "127.1.2.3",
        "ipv4:127.0.0.1:1", "[::1]:1", "ipv6:[::1]:1", "0.0.0.0:1", "[::]:1", "dns://8.8.8.8/localhost:1"}) {
    CHECK(hsrpc::is_loopback(target));
  }
  for (const char* target : {"", "example.com:1", "localhost.example.com:1", "127.example.com:1", "10.0.0.1:1",
                             "dns:///example.com:1", "[::2]:1", "dns://127.0.0.1/example.com:1", "mylocalhost:1"}) {
    CHECK(!hsrpc::is_loopback(target));
  }
}

void test_a_stream_gives_deltas_then_its_finish() {
  Server server(spell);
  hsrpc::Client client(server.target());
  hsrpc::Stream stream = client.generate("fox");
  CHECK(stream.start() == nullptr);
  std::string text;
  for (const auto& delta : stream) {
    CHECK(stream.start() != nullptr && stream.start()->model() == "m");
    CHECK((stream.finish() != nullptr) == (delta.text() == "x"));
    text += delta.text();
  }
  CHECK(text == "fox");
  CHECK(stream.finish() != nullptr && stream.finish()->reason() == v1::FINISH_REASON_EOS);
  CHECK(stream.begin() == stream.end());
}

void test_a_stream_is_a_range_of_input_iterators() {
  Server server(spell);
  hsrpc::Client client(server.target());
  hsrpc::Stream stream = client.generate("fox");
  auto it = stream.begin();
  CHECK(it->text() == "f");
  CHECK((*it++).text() == "f");
  hsrpc::Stream moved = std::move(stream);
  CHECK((*it).text() == "o");
  const std::vector<v1::Delta> rest(++it, moved.end());
  CHECK(rest.size() == 1 && rest.at(0).text() == "x");
}

void test_a_second_loop_goes_on() {
  Server server(spell);
  hsrpc::Client client(server.target());
  hsrpc::Stream stream = client.generate("fox");
  std::string text;
  for (const auto& delta : stream) {
    text += delta.text();
    break;
  }
  for (const auto& delta : stream) text += delta.text();
  CHECK(text == "fox");
}

void test_leaving_a_loop_cancels_the_call() {
  Server server(babble);
  hsrpc::Client client(server.target());
  for (const auto& delta : client.generate("hi")) {
    CHECK(delta.text() == "x");
    break;
  }
  for (int i = 0; i < 500 && !server.cancelled(); ++i) std::this_thread::sleep_for(milliseconds(10));
  CHECK(server.cancelled());
}

void test_a_stream_outlives_its_client() {
  Server server(spell);
  auto client = std::make_unique<hsrpc::Client>(server.target());
  hsrpc::Stream stream = client->generate("fox");
  client.reset();
  CHECK(std::distance(stream.begin(), stream.end()) == 3);
}

void test_another_thread_may_cancel() {
  Server server(babble);
  hsrpc::Client client(server.target());
  hsrpc::Stream stream = client.generate("hi");
  auto it = stream.begin();
  auto cancel = std::async(std::launch::async, [&stream] { stream.cancel(); });
  CHECK(fails(
      [&] {
        while (it != stream.end()) ++it;
      },
      StatusCode::CANCELLED));
  CHECK(fails([&] { stream.begin(); }, StatusCode::CANCELLED));
}

void test_a_call_can_be_left_before_it_has_a_connection() {
  hsrpc::Client client("ipv4:127.0.0.1:1");
  { hsrpc::Stream stream = client.generate("hi"); }
  hsrpc::Stream stream = client.generate("hi");
  stream.cancel();
  CHECK(fails([&] { stream.begin(); }, StatusCode::CANCELLED));
}

void test_a_stream_without_its_last_response_failed() {
  Server server([](const v1::GenerateRequest&, Server::Writer* writer) {
    write(writer, "x");
    return grpc::Status::OK;
  });
  hsrpc::Client client(server.target());
  CHECK(fails([&] { client.complete("hi"); }, StatusCode::DATA_LOSS));
}

void test_a_call_is_made_again_until_an_answer_begins() {
  std::atomic<int> refusals{2};
  Server refusing([&](const v1::GenerateRequest& request, Server::Writer* writer) {
    return refusals-- > 0 ? grpc::Status(StatusCode::RESOURCE_EXHAUSTED, "full") : spell(request, writer);
  });
  v1::GenerateRequest request;
  request.set_text("fox");
  request.set_model(std::string(1'000'000, 'x'));  // more than gRPC would keep for another attempt by itself
  CHECK(hsrpc::Client(refusing.target()).complete(request).text == "fox");
  CHECK(refusing.num_calls() == 3);

  Server breaking([](const v1::GenerateRequest&, Server::Writer* writer) {
    write(writer, "x");
    return grpc::Status(StatusCode::UNAVAILABLE, "broken");
  });
  hsrpc::Client client(breaking.target());
  CHECK(fails([&] { client.complete("hi"); }, StatusCode::UNAVAILABLE));
  CHECK(breaking.num_calls() == 1);

  Server wrong([](const v1::GenerateRequest&, Server::Writer*) { return grpc::Status(StatusCode::INTERNAL, "no"); });
  CHECK(fails([&] { hsrpc::Client(wrong.target()).complete("hi"); }, StatusCode::INTERNAL));
  CHECK(wrong.num_calls() == 1);
}

void test_calls_bring_token_and_metadata() {
  Server server(spell);
  hsrpc::CallOptions options;
  options.metadata.emplace("x-hsrpc-client", "me");
  hsrpc::Client(server.target(), with_token("secret")).complete("fox", {}, options);
  const auto metadata = server.seen().metadata;
  CHECK(metadata.count("authorization") == 1);
  CHECK(metadata.find("authorization")->second == "Bearer secret");
  CHECK(metadata.find("x-hsrpc-client")->second == "me");
}

/// gRPC would end the process.
void test_metadata_is_checked() {
  hsrpc::Client client("ipv4:127.0.0.1:1");
  const auto call = [&](const std::string& name, const std::string& value) {
    return [&client, name, value] { client.generate("hi", {}, {{}, {{name, value}}}); };
  };
  CHECK(throws<std::invalid_argument>(call("X-Client", "me"), "metadata: X-Client is no name"));
  CHECK(throws<std::invalid_argument>(call("", "me"), "metadata:  is no name"));
  CHECK(throws<std::invalid_argument>(call("x-client", "m\xc3\xa9"), "metadata: the value of x-client is not"));
  call("x-client-bin", "m\xc3\xa9")();
}

void test_a_call_has_its_own_deadline_or_the_clients() {
  Server server(spell);
  hsrpc::Client client(server.target(), with_timeout(std::chrono::hours(1)));
  const auto left = [&] { return server.seen().deadline - std::chrono::system_clock::now(); };
  client.complete("fox");
  CHECK(left() > std::chrono::minutes(59) && left() <= std::chrono::minutes(61));
  client.complete("fox", {}, {std::chrono::hours(5), {}});
  CHECK(left() > std::chrono::hours(4) && left() < std::chrono::hours(6));
  CHECK(throws<std::invalid_argument>([&] { client.complete("fox", {}, {milliseconds(-1), {}}); }, "timeout: -1 ms"));
}

void test_a_conversation_takes_the_place_of_the_input() {
  Server server([](const v1::GenerateRequest&, Server::Writer* writer) {
    write(writer, "x", true);
    return grpc::Status::OK;
  });
  v1::GenerateRequest settings;
  settings.mutable_sampling()->set_temperature(0);
  settings.mutable_chat()->add_tools("{}");
  settings.mutable_chat()->add_messages()->set_role("system");
  hsrpc::Client client(server.target());
  client.complete_chat({hsrpc::message("user", "Hi")}, settings);
  const v1::GenerateRequest chat = server.seen().request;
  CHECK(chat.sampling().has_temperature());
  CHECK(chat.chat().tools_size() == 1 && chat.chat().messages_size() == 1);
  CHECK(chat.chat().messages(0).role() == "user" && chat.chat().messages(0).content() == "Hi");
  client.complete("Hi", settings);
  const v1::GenerateRequest text = server.seen().request;
  CHECK(text.text() == "Hi" && !text.has_chat());
}

}  // namespace

int main() {
  test_errors_have_their_details();
  test_errors_without_details_are_errors_too();
  test_descriptors_of_google_rpc_are_not_registered();
  test_options_are_checked();
  test_loopback_is_known_by_its_names();
  test_a_stream_gives_deltas_then_its_finish();
  test_a_stream_is_a_range_of_input_iterators();
  test_a_second_loop_goes_on();
  test_leaving_a_loop_cancels_the_call();
  test_a_stream_outlives_its_client();
  test_another_thread_may_cancel();
  test_a_call_can_be_left_before_it_has_a_connection();
  test_a_stream_without_its_last_response_failed();
  test_a_call_is_made_again_until_an_answer_begins();
  test_calls_bring_token_and_metadata();
  test_metadata_is_checked();
  test_a_call_has_its_own_deadline_or_the_clients();
  test_a_conversation_takes_the_place_of_the_input();
  if (failures == 0) std::cout << "all tests passed" << std::endl;
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
