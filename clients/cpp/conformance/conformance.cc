// Program of the conformance suite: requests as lines of JSON in, results as lines of JSON out; see
// clients/conformance/README.md.

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <initializer_list>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "hsrpc/client.h"

namespace {

using google::protobuf::Struct;
using google::protobuf::Value;
using Messages = std::vector<hsrpc::v1::Message>;

constexpr std::chrono::milliseconds kPoll(20);

// --- JSON

Value number(double value) {
  Value json;
  json.set_number_value(value);
  return json;
}

Value boolean(bool value) {
  Value json;
  json.set_bool_value(value);
  return json;
}

Value text(const std::string& value) {
  Value json;
  json.set_string_value(value);
  return json;
}

Value null() {
  Value json;
  json.set_null_value(google::protobuf::NULL_VALUE);
  return json;
}

Value text_or_null(const std::string& value) { return value.empty() ? null() : text(value); }

Value object(const std::initializer_list<std::pair<std::string, Value>>& fields) {
  Value json;
  for (const auto& [name, value] : fields) (*json.mutable_struct_value()->mutable_fields())[name] = value;
  return json;
}

template <typename Items, typename ToJson>
Value array(const Items& items, const ToJson& to_json) {
  Value json;
  json.mutable_list_value();  // an empty one is a list too
  for (const auto& item : items) *json.mutable_list_value()->add_values() = to_json(item);
  return json;
}

template <typename Message>
Message parse(const std::string& json) {
  Message message;
  const auto status = google::protobuf::util::JsonStringToMessage(json, &message);
  if (!status.ok()) throw std::runtime_error("no JSON as it should be: " + status.ToString());
  return message;
}

std::string print(const google::protobuf::Message& message) {
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json);
  if (!status.ok()) throw std::runtime_error("no JSON of it: " + status.ToString());
  return json;
}

/// The value of a name; null where there is none.
const Value& get(const Struct& fields, const std::string& name) {
  const auto found = fields.fields().find(name);
  return found == fields.fields().end() ? Value::default_instance() : found->second;
}

// --- Requests

struct Task {
  std::string id;
  std::string target;
  hsrpc::ClientOptions client;
  std::string call;
  hsrpc::v1::GenerateRequest request;
  hsrpc::CallOptions options;
  int cancel_after = 0;  // 0: never
  int streams = 1;
  int repeat = 1;
  std::string pause_file;
};

int count(const Struct& fields, const std::string& name, int otherwise) {
  const Value& value = get(fields, name);
  return value.has_number_value() ? static_cast<int>(value.number_value()) : otherwise;
}

Task read_task(const std::string& line) {
  const auto fields = parse<Struct>(line);
  Task task;
  task.id = get(fields, "id").string_value();
  task.target = get(fields, "target").string_value();
  if (const Value& tls = get(fields, "tls"); tls.has_struct_value()) {
    const Struct& files = tls.struct_value();
    task.client.tls = hsrpc::Tls{get(files, "ca").string_value(), get(files, "cert").string_value(),
                                 get(files, "key").string_value()};
  }
  if (const Value& token = get(fields, "token"); token.has_string_value()) task.client.token = token.string_value();
  task.call = get(fields, "call").string_value();
  task.request = parse<hsrpc::v1::GenerateRequest>(print(get(fields, "request")));
  if (const Value& deadline = get(fields, "deadline_s"); deadline.has_number_value()) {
    task.options.timeout = std::chrono::milliseconds(std::llround(deadline.number_value() * 1000));
  }
  task.cancel_after = count(fields, "cancel_after", 0);
  task.streams = count(fields, "streams", 1);
  task.repeat = count(fields, "repeat", 1);
  task.pause_file = get(fields, "pause_file").string_value();
  return task;
}

// --- Results

struct Result {
  hsrpc::Completion completion;
  int deltas = 0;
  bool cancelled = false;
  std::optional<hsrpc::Error> error;
};

Value logprob_json(const hsrpc::v1::TokenLogprob& logprob) {
  const auto top = array(logprob.top(), [](const hsrpc::v1::TopLogprob& each) {
    return object({{"token_id", number(each.token_id())}, {"logprob", number(each.logprob())}});
  });
  return object({{"token_id", number(logprob.token_id())},
                 {"logprob", number(logprob.logprob())},
                 {"rank", number(logprob.rank())},
                 {"top", top}});
}

Value error_json(const hsrpc::Error& error) {
  const auto fields = array(error.fields(), [](const hsrpc::FieldViolation& violation) {
    return object({{"field", text(violation.field)}, {"description", text(violation.description)}});
  });
  Value metadata;
  metadata.mutable_struct_value();
  for (const auto& [name, value] : error.metadata()) {
    (*metadata.mutable_struct_value()->mutable_fields())[name] = text(value);
  }
  const auto delay = error.retry_delay();
  return object({{"code", text(hsrpc::code_name(error.code()))},
                 {"message", text(error.message())},
                 {"fields", fields},
                 {"retry_delay_s", delay ? number(std::chrono::duration<double>(*delay).count()) : null()},
                 {"reason", text_or_null(error.reason())},
                 {"domain", text_or_null(error.domain())},
                 {"metadata", metadata}});
}

Value result_json(const Result& result) {
  const auto& [start, output, token_ids, logprobs, prompt_logprobs, finish] = result.completion;
  const bool finished = finish.reason() != hsrpc::v1::FINISH_REASON_UNSPECIFIED;
  return object({{"text", text(output)},
                 {"deltas", number(result.deltas)},
                 {"token_ids", array(token_ids, [](int token_id) { return number(token_id); })},
                 {"logprobs", array(logprobs, logprob_json)},
                 {"prompt_tokens", number(start.prompt_tokens())},
                 {"completion_tokens", number(finish.usage().completion_tokens())},
                 {"finish_reason", finished ? text(hsrpc::v1::FinishReason_Name(finish.reason())) : null()},
                 {"stop_string", finish.has_stop_string() ? text(finish.stop_string()) : null()},
                 {"cancelled", boolean(result.cancelled)},
                 {"error", result.error ? error_json(*result.error) : null()}});
}

// --- Calls

Messages messages_of(const hsrpc::v1::GenerateRequest& request) {
  return {request.chat().messages().begin(), request.chat().messages().end()};
}

/// Reads the stream, up to where the task leaves it, into `result`, which keeps what came before an error.
void read_stream(hsrpc::Stream stream, const Task& task, Result* result) {
  hsrpc::Completion& completion = result->completion;
  for (const auto& delta : stream) {
    if (stream.start()) completion.start = *stream.start();
    completion.text += delta.text();
    completion.token_ids.insert(completion.token_ids.end(), delta.token_ids().begin(), delta.token_ids().end());
    completion.logprobs.insert(completion.logprobs.end(), delta.logprobs().begin(), delta.logprobs().end());
    if (!delta.text().empty() || !delta.token_ids().empty()) ++result->deltas;
    if (result->deltas == task.cancel_after && task.cancel_after > 0) {
      result->cancelled = true;
      return;
    }
  }
  completion.finish = *stream.finish();
}

Result run_call(hsrpc::Client* client, const Task& task) {
  Result result;
  try {
    if (task.call == "generate") {
      read_stream(client->generate(task.request, task.options), task, &result);
    } else if (task.call == "chat") {
      read_stream(client->chat(messages_of(task.request), task.request, task.options), task, &result);
    } else if (task.call == "text") {
      result.completion = client->complete(task.request, task.options);
    } else if (task.call == "chat_text") {
      result.completion = client->complete_chat(messages_of(task.request), task.request, task.options);
    } else {
      throw std::runtime_error("call: " + task.call + "; use generate, chat, text or chat_text");
    }
  } catch (const hsrpc::Error& error) {
    result.error = error;
  }
  return result;
}

/// Tells the runner that it may do what it does between repeats, and waits until it has.
void pause(const std::string& path) {
  std::ofstream(path + ".waiting").close();
  while (!std::filesystem::exists(path)) std::this_thread::sleep_for(kPoll);
}

std::vector<Result> run(const Task& task) {
  hsrpc::Client client(task.target, task.client);
  std::vector<Result> results;
  for (int round = 0; round < task.repeat; ++round) {
    if (round > 0 && !task.pause_file.empty()) pause(task.pause_file);
    std::vector<std::future<Result>> calls;
    for (int stream = 0; stream < task.streams; ++stream) {
      calls.push_back(std::async(std::launch::async, run_call, &client, std::cref(task)));
    }
    for (auto& call : calls) results.push_back(call.get());
  }
  return results;
}

}  // namespace

int main() {
  try {
    for (std::string line; std::getline(std::cin, line);) {
      const Task task = read_task(line);
      std::cout << print(object({{"id", text(task.id)}, {"results", array(run(task), result_json)}})) << std::endl;
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
