#include "addon/bindings.h"
#include "addon/process.h"
#include "addon/task.h"

namespace obd::addon {

void addProcess(Napi::Env env, Napi::Object exports) {
  exports.Set("clockRealtime", Napi::Function::New(
                                   env,
                                   [](const Napi::CallbackInfo& info) -> Napi::Value {
                                     return toJs(info.Env(), clockRealtimeNs());
                                   },
                                   "clockRealtime"));
  exports.Set("lockFile", promising(env, "lockFile", [](const Napi::CallbackInfo& info) {
                const std::string path = stringFrom(info[0], "path");
                return Task<bool>::start(
                    info.Env(), Where::kPool, [=] { return lockForLife(path); },
                    [](Napi::Env there, bool& locked) { return toJs(there, locked); });
              }));
  exports.Set("peerCredentials", Napi::Function::New(
                                     env,
                                     [](const Napi::CallbackInfo& info) -> Napi::Value {
                                       const uint32_t fd = uint32From(info[0], "fd");
                                       const auto peer = peerCredentials(static_cast<int>(fd));
                                       if (!peer.isOk()) throw toError(info.Env(), peer.status());
                                       Napi::Object out = Napi::Object::New(info.Env());
                                       out.Set("uid", toJs(info.Env(), peer.value().uid));
                                       out.Set("gid", toJs(info.Env(), peer.value().gid));
                                       out.Set("pid", toJs(info.Env(), peer.value().pid));
                                       return out;
                                     },
                                     "peerCredentials"));
  exports.Set("notify", promising(env, "notify", [](const Napi::CallbackInfo& info) {
                const std::string socket = stringFrom(info[0], "socket");
                const std::string state = stringFrom(info[1], "state");
                return startTask(info.Env(), Where::kPool, [=] { return notifyServiceManager(socket, state); });
              }));
}

}  // namespace obd::addon
