#include "tools/control-client.h"

#include <curl/curl.h>

#include <array>
#include <memory>
#include <string_view>
#include <utility>

namespace obd {
namespace {

constexpr size_t kReplyMax = 1024 * 1024;

size_t collect(char* data, size_t, size_t size, void* into) {
  auto* reply = static_cast<std::string*>(into);
  if (reply->size() + size > kReplyMax) return 0;  // curl takes that as an error
  reply->append(data, size);
  return size;
}

// Connect's names of gRPC codes.
Code codeOf(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, Code>, 12> kCodes = {{
      {"invalid_argument", Code::kInvalidArgument},
      {"out_of_range", Code::kInvalidArgument},
      {"not_found", Code::kNotFound},
      {"already_exists", Code::kAlreadyExists},
      {"failed_precondition", Code::kFailedPrecondition},
      {"data_loss", Code::kDataLoss},
      {"resource_exhausted", Code::kResourceExhausted},
      {"permission_denied", Code::kPermissionDenied},
      {"unavailable", Code::kUnavailable},
      {"deadline_exceeded", Code::kUnavailable},
      {"canceled", Code::kCancelled},
      {"unimplemented", Code::kUnimplemented},
  }};
  for (const auto& [known, code] : kCodes) {
    if (known == name) return code;
  }
  return Code::kIo;
}

}  // namespace

Result<nlohmann::json> ControlClient::call(const std::string& method, const nlohmann::json& request,
                                           std::chrono::seconds timeout) const {
  const std::unique_ptr<CURL, void (*)(CURL*)> curl(curl_easy_init(), curl_easy_cleanup);
  if (!curl) return Status(Code::kResourceExhausted, "no memory for an HTTP client");
  curl_slist* list = curl_slist_append(nullptr, "Content-Type: application/json");
  list = curl_slist_append(list, "Connect-Protocol-Version: 1");
  list = curl_slist_append(list, "Expect:");
  const std::unique_ptr<curl_slist, void (*)(curl_slist*)> headers(list, curl_slist_free_all);

  const std::string url = "http://localhost/overlaybd.control.v1.BlockDaemon/" + method;
  const std::string body = request.dump();
  std::string reply;
  curl_easy_setopt(curl.get(), CURLOPT_URL, url.c_str());
  curl_easy_setopt(curl.get(), CURLOPT_UNIX_SOCKET_PATH, socketPath_.c_str());
  curl_easy_setopt(curl.get(), CURLOPT_PROXY, "");
  curl_easy_setopt(curl.get(), CURLOPT_HTTPHEADER, headers.get());
  curl_easy_setopt(curl.get(), CURLOPT_POSTFIELDS, body.c_str());
  curl_easy_setopt(curl.get(), CURLOPT_POSTFIELDSIZE, static_cast<long>(body.size()));
  curl_easy_setopt(curl.get(), CURLOPT_WRITEFUNCTION, collect);
  curl_easy_setopt(curl.get(), CURLOPT_WRITEDATA, &reply);
  curl_easy_setopt(curl.get(), CURLOPT_CONNECTTIMEOUT, 5L);
  curl_easy_setopt(curl.get(), CURLOPT_TIMEOUT, static_cast<long>(timeout.count()));
  curl_easy_setopt(curl.get(), CURLOPT_NOSIGNAL, 1L);
  const CURLcode failure = curl_easy_perform(curl.get());
  if (failure != CURLE_OK) {
    return unavailable("overlaybd-blockd at " + socketPath_ + ": " + curl_easy_strerror(failure));
  }
  long httpStatus = 0;
  curl_easy_getinfo(curl.get(), CURLINFO_RESPONSE_CODE, &httpStatus);
  nlohmann::json answer = nlohmann::json::parse(reply, nullptr, false);
  if (httpStatus == 200 && answer.is_object()) return answer;
  if (answer.is_object() && answer.contains("code") && answer.at("code").is_string()) {
    const auto message = answer.find("message");
    return Status(codeOf(answer.at("code").get<std::string>()),
                  message != answer.end() && message->is_string() ? message->get<std::string>() : method + " failed");
  }
  return ioError("overlaybd-blockd answered " + method + " with HTTP status " + std::to_string(httpStatus));
}

}  // namespace obd
