#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "addon/bindings.h"
#include "addon/served-device.h"
#include "addon/task.h"

namespace obd::addon {
namespace {

constexpr napi_type_tag kDeviceTag = {0x6f7665726c617962, 0x642d646576696365};

// The devices of one JavaScript environment that have not been stopped, so that its end can see to them. Locked.
class LiveDevices final {
 public:
  void add(const std::shared_ptr<ServedDevice>& device) {
    const std::lock_guard lock(mutex_);
    std::erase_if(devices_, [](const auto& known) { return known->isStopped(); });
    devices_.push_back(device);
  }
  void remove(const std::shared_ptr<ServedDevice>& device) {
    const std::lock_guard lock(mutex_);
    std::erase(devices_, device);
  }
  void abandonAll() {
    std::vector<std::shared_ptr<ServedDevice>> devices;
    {
      const std::lock_guard lock(mutex_);
      devices.swap(devices_);
    }
    for (const auto& device : devices) device->abandon();
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<ServedDevice>> devices_;
};

// What the functions of one handle share. Goes when the last of them is collected.
class Handle final {
 public:
  Handle(std::shared_ptr<ServedDevice> device, std::shared_ptr<LiveDevices> live)
      : device_(std::move(device)), live_(std::move(live)) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (device_->isStopped()) {
      live_->remove(device_);
      return;
    }
    // Stopping waits for the kernel: not on the thread that collects garbage. Should the environment end meanwhile, its
    // clean-up finds the device among the live ones and waits for the same stop.
    try {
      std::thread([device = device_, live = live_] {
        device->abandon();
        live->remove(device);
      }).detach();
    } catch (const std::system_error&) {
      // Without a thread the device goes on until the environment ends.
    }
  }
  const std::shared_ptr<ServedDevice>& device() const { return device_; }

 private:
  const std::shared_ptr<ServedDevice> device_;
  const std::shared_ptr<LiveDevices> live_;
};

Napi::Value statsToJs(Napi::Env env, const BlockTargetStats& stats) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("readOps", toJs(env, stats.readOps));
  out.Set("readBytes", toJs(env, stats.readBytes));
  out.Set("writeOps", toJs(env, stats.writeOps));
  out.Set("writeBytes", toJs(env, stats.writeBytes));
  out.Set("discardOps", toJs(env, stats.discardOps));
  out.Set("discardBytes", toJs(env, stats.discardBytes));
  out.Set("flushOps", toJs(env, stats.flushOps));
  out.Set("errors", toJs(env, stats.errors));
  return out;
}

// The functions are bound to the device, not to `this`: no object of another type can reach it.
Napi::Value handleToJs(Napi::Env env, const std::shared_ptr<ServedDevice>& device,
                       const std::shared_ptr<LiveDevices>& live) {
  live->add(device);
  const auto handle = std::make_shared<Handle>(device, live);
  Napi::Object out = Napi::Object::New(env);
  out.TypeTag(&kDeviceTag);
  out.Set("type", "device");
  out.Set("path", toJs(env, device->target().path()));
  out.Set("major", toJs(env, device->target().major()));
  out.Set("minor", toJs(env, device->target().minor()));
  out.Set("sizeBytes", toJs(env, device->sizeBytes()));
  out.Set("readOnly", toJs(env, device->readOnly()));
  out.Set("stats", Napi::Function::New(
                       env,
                       [handle](const Napi::CallbackInfo& info) -> Napi::Value {
                         const ServedDevice& served = *handle->device();
                         if (served.isStopped()) {
                           throw toError(info.Env(),
                                         failedPrecondition("device " + served.target().path() + " is stopped"));
                         }
                         return statsToJs(info.Env(), served.stats());
                       },
                       "stats"));
  out.Set("isStopped", Napi::Function::New(
                           env,
                           [handle](const Napi::CallbackInfo& info) -> Napi::Value {
                             return toJs(info.Env(), handle->device()->isStopped());
                           },
                           "isStopped"));
  out.Set("flush", promising(env, "flush", [handle](const Napi::CallbackInfo& info) {
            return startTask(info.Env(), Where::kThread, [served = handle->device()] { return served->flush(); });
          }));
  out.Set("stop", promising(env, "stop", [handle](const Napi::CallbackInfo& info) {
            const bool force = boolFrom(info[0], "force");
            return startTask(info.Env(), Where::kThread,
                             [served = handle->device(), force] { return served->stop(force); });
          }));
  out.Freeze();
  return out;
}

}  // namespace

void addDevices(Napi::Env env, Napi::Object exports) {
  const auto live = std::make_shared<LiveDevices>();
  // Not at process.exit, nor at a crash: there the devices end with the process.
  env.AddCleanupHook([live] { live->abandonAll(); });

  exports.Set("attachDevice", promising(env, "attachDevice", [live](const Napi::CallbackInfo& info) {
                const Napi::Object given = objectFrom(info[0], "options");
                AttachOptions options;
                options.configPath = stringFrom(given.Get("configPath"), "configPath");
                options.readOnly = boolFrom(given.Get("readOnly"), "readOnly");
                options.directIo = boolFrom(given.Get("directIo"), "directIo");
                options.target.sectorSizeBytes = uint32From(given.Get("sectorSizeBytes"), "sectorSizeBytes");
                options.target.threads = uint32From(given.Get("threads"), "threads");
                options.target.name = stringFrom(given.Get("name"), "name");
                options.target.runDir = stringFrom(given.Get("runDir"), "runDir");
                return Task<std::shared_ptr<ServedDevice>>::start(
                    info.Env(), Where::kThread, [options] { return ServedDevice::attach(options); },
                    [live](Napi::Env there, std::shared_ptr<ServedDevice>& device) {
                      return handleToJs(there, device, live);
                    });
              }));
  exports.Set("releaseStaleDevices", promising(env, "releaseStaleDevices", [](const Napi::CallbackInfo& info) {
                const std::string prefix = stringFrom(info[0], "namePrefix");
                if (prefix.empty()) throwBadArgument(info.Env(), "namePrefix must not be empty");
                return Task<std::vector<std::string>>::start(
                    info.Env(), Where::kThread,
                    [prefix]() -> Result<std::vector<std::string>> {
                      OBD_ASSIGN_OR_RETURN(std::vector<std::string> paths, findLoops(prefix));
                      for (const std::string& path : paths) OBD_RETURN_IF_ERROR(unbindStaleLoop(path));
                      return paths;
                    },
                    [](Napi::Env there, std::vector<std::string>& paths) { return toJs(there, paths); });
              }));
}

}  // namespace obd::addon
