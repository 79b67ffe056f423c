// Result<T> of work off the JavaScript thread as a promise. A bad Status rejects it with an Error that has `code` and
// `errno`. No exception leaves this file.
#pragma once

#include <napi.h>

#include <functional>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>

#include "addon/to-js.h"
#include "base/result.h"

namespace obd::addon {

enum class Where : uint8_t {
  kPool,    // libuv's four threads, which every fs call of the process shares: milliseconds only
  kThread,  // a thread of its own: whatever waits for a device, a disk or the kernel
};

struct Nothing {};

template <typename T>
Result<T> runGuarded(const std::function<Result<T>()>& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return Status(Code::kResourceExhausted, "out of memory");
  } catch (const std::exception& error) {
    return ioError(std::string("bug: ") + error.what());
  }
}

inline Result<Nothing> orNothing(Status status) {
  if (!status.isOk()) return status;
  return Nothing{};
}

template <typename T>
class Task final {
 public:
  using Work = std::function<Result<T>()>;
  // Runs on the JavaScript thread. May take what is in `value`.
  using Convert = std::function<Napi::Value(Napi::Env, T& value)>;

  static Napi::Promise start(Napi::Env env, Where where, Work work, Convert convert) {
    auto task = std::make_unique<Task>(env, std::move(work), std::move(convert));
    const Napi::Promise promise = task->deferred_.Promise();
    if (where == Where::kPool) {
      (new PoolWorker(env, std::move(task)))->Queue();
    } else {
      startThread(env, std::move(task));
    }
    return promise;
  }

  Task(Napi::Env env, Work work, Convert convert)
      : deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), convert_(std::move(convert)) {}

 private:
  class PoolWorker final : public Napi::AsyncWorker {
   public:
    PoolWorker(Napi::Env env, std::unique_ptr<Task> task) : AsyncWorker(env, "overlaybd"), task_(std::move(task)) {}
    void Execute() override { task_->run(); }
    void OnOK() override { task_->settle(Env()); }

   private:
    std::unique_ptr<Task> task_;
  };

  static void startThread(Napi::Env env, std::unique_ptr<Task> task) {
    auto back = Napi::ThreadSafeFunction::New(env, Napi::Function(), "overlaybd", 0, 1);
    Task* running = task.get();
    try {
      std::thread([running, back] {
        running->run();
        const auto settle = [](Napi::Env there, Napi::Function, Task* done) {
          const std::unique_ptr<Task> owned(done);
          if (static_cast<napi_env>(there) != nullptr) owned->settle(there);
        };
        // Refused only when the environment has ended: the promise went with it, and what the task holds is kept,
        // because its JavaScript handles may not be touched from here.
        (void)back.BlockingCall(running, settle);
        Napi::ThreadSafeFunction copy = back;
        (void)copy.Release();
      }).detach();
      (void)task.release();
    } catch (const std::system_error& error) {
      (void)back.Release();
      task->result_.emplace(fromErrno("start a thread", error.code().value()));
      task->settle(env);
    }
  }

  void run() { result_.emplace(runGuarded<T>(work_)); }

  void settle(Napi::Env env) {
    const Napi::HandleScope scope(env);
    try {
      if (!result_->isOk()) {
        deferred_.Reject(toError(env, result_->status()).Value());
      } else {
        deferred_.Resolve(convert_(env, result_->value()));
      }
    } catch (const Napi::Error& error) {
      deferred_.Reject(error.Value());
    }
  }

  Napi::Promise::Deferred deferred_;
  Work work_;
  Convert convert_;
  std::optional<Result<T>> result_;
};

// For work without a value.
inline Napi::Promise startTask(Napi::Env env, Where where, std::function<Status()> work) {
  return Task<Nothing>::start(
      env, where, [work = std::move(work)] { return orNothing(work()); },
      [](Napi::Env there, Nothing&) -> Napi::Value { return there.Undefined(); });
}

// A function that answers with a promise also for arguments it cannot read.
template <typename Body>
Napi::Function promising(Napi::Env env, const char* name, Body body) {
  return Napi::Function::New(
      env,
      [body](const Napi::CallbackInfo& info) -> Napi::Value {
        try {
          return body(info);
        } catch (const Napi::Error& error) {
          const auto deferred = Napi::Promise::Deferred::New(info.Env());
          deferred.Reject(error.Value());
          return deferred.Promise();
        }
      },
      name);
}

}  // namespace obd::addon
