#include "addon/bindings.h"
#include "addon/mount-table.h"
#include "addon/task.h"

namespace obd::addon {

void addMounts(Napi::Env env, Napi::Object exports) {
  exports.Set("mount", promising(env, "mount", [](const Napi::CallbackInfo& info) {
                const std::string type = stringFrom(info[0], "type");
                const std::string source = stringFrom(info[1], "source");
                const std::string target = stringFrom(info[2], "target");
                const std::vector<std::string> options = stringsFrom(info[3], "options");
                return startTask(info.Env(), Where::kThread,
                                 [=] { return mountFileSystem(type, source, target, options); });
              }));
  exports.Set("unmount", promising(env, "unmount", [](const Napi::CallbackInfo& info) {
                const std::string target = stringFrom(info[0], "target");
                const bool detach = boolFrom(info[1], "detach");
                return startTask(info.Env(), Where::kThread, [=] { return unmountFileSystem(target, detach); });
              }));
  exports.Set("mountTable", promising(env, "mountTable", [](const Napi::CallbackInfo& info) {
                const std::string pid = stringFrom(info[0], "pid");
                return Task<std::vector<MountTableEntry>>::start(
                    info.Env(), Where::kPool, [=] { return readMountTable(pid); },
                    [](Napi::Env there, std::vector<MountTableEntry>& entries) -> Napi::Value {
                      Napi::Array out = Napi::Array::New(there, entries.size());
                      for (uint32_t i = 0; i < entries.size(); i++) {
                        const MountTableEntry& entry = entries[i];
                        Napi::Object row = Napi::Object::New(there);
                        row.Set("mountPoint", toJs(there, entry.mountPoint));
                        row.Set("source", toJs(there, entry.source));
                        row.Set("fsType", toJs(there, entry.fsType));
                        row.Set("major", toJs(there, entry.deviceMajor));
                        row.Set("minor", toJs(there, entry.deviceMinor));
                        row.Set("options", toJs(there, entry.options));
                        out.Set(i, row);
                      }
                      return out;
                    });
              }));
}

}  // namespace obd::addon
