#include "addon/bindings.h"
#include "addon/to-js.h"

namespace {

using obd::Code;

Napi::Object init(Napi::Env env, Napi::Object exports) {
  using namespace obd::addon;
  // Without "ok": no rejection carries it.
  std::vector<std::string> codes;
  for (auto code = static_cast<uint8_t>(Code::kInvalidArgument); code <= static_cast<uint8_t>(Code::kUnimplemented);
       code++) {
    codes.emplace_back(obd::codeName(static_cast<Code>(code)));
  }
  exports.Set("codes", toJs(env, codes));
  exports.Set("version", toJs(env, std::string(OBD_VERSION)));
  addProcess(env, exports);
  addLayers(env, exports);
  addDevices(env, exports);
  addMounts(env, exports);
  addTrees(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(overlaybd, init)
