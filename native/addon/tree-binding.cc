#include "addon/bindings.h"
#include "addon/task.h"
#include "addon/tree.h"

namespace obd::addon {

void addTrees(Napi::Env env, Napi::Object exports) {
  exports.Set("removeTree", promising(env, "removeTree", [](const Napi::CallbackInfo& info) {
                const std::string path = stringFrom(info[0], "path");
                return startTask(info.Env(), Where::kThread, [=] { return removeTree(path); });
              }));
  exports.Set("diskUsage", promising(env, "diskUsage", [](const Napi::CallbackInfo& info) {
                const std::string path = stringFrom(info[0], "path");
                const std::vector<std::string> skip = stringsFrom(info[1], "skip");
                return Task<TreeUsage>::start(
                    info.Env(), Where::kThread, [=] { return measureTree(path, skip); },
                    [](Napi::Env there, TreeUsage& usage) -> Napi::Value {
                      Napi::Object out = Napi::Object::New(there);
                      out.Set("sizeBytes", toJs(there, usage.sizeBytes));
                      out.Set("inodes", toJs(there, usage.inodes));
                      return out;
                    });
              }));
  exports.Set("syncDirectory", promising(env, "syncDirectory", [](const Napi::CallbackInfo& info) {
                const std::string path = stringFrom(info[0], "path");
                return startTask(info.Env(), Where::kThread, [=] { return syncDirectory(path); });
              }));
}

}  // namespace obd::addon
