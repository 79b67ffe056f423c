// One function per component; each adds its part of the surface (src/engine/native.ts) to `exports`.
#pragma once

#include <napi.h>

namespace obd::addon {

void addLayers(Napi::Env env, Napi::Object exports);
void addDevices(Napi::Env env, Napi::Object exports);
void addMounts(Napi::Env env, Napi::Object exports);
void addTrees(Napi::Env env, Napi::Object exports);
void addProcess(Napi::Env env, Napi::Object exports);

}  // namespace obd::addon
