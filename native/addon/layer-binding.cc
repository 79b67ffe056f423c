#include <array>
#include <optional>

#include "addon/bindings.h"
#include "addon/task.h"
#include "lsmt/layer-reader.h"
#include "lsmt/upper.h"
#include "zfile/layer-file.h"

namespace obd::addon {
namespace {

struct LayerFacts {
  const char* kind = "not-a-layer";
  uint64_t virtualSizeBytes = 0;
  LayerFileKind wrappers;
};

// A sealed layer says so in its trailer; a writable one has only its header. A file that claims to be sealed and is
// damaged is an error, never "writable".
Result<LayerFacts> inspectLayer(const std::string& path) {
  LayerFacts facts;
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> file, openLayerFile(path, false, &facts.wrappers));
  OBD_ASSIGN_OR_RETURN(const uint64_t sizeBytes, file->size());
  if (sizeBytes < kHeaderSize) return facts;
  std::array<std::byte, kHeaderSize> bytes;
  OBD_RETURN_IF_ERROR(file->preadExact(bytes, 0));
  const Result<LayerHeader> header = decodeHeader(bytes);
  if (!header.isOk() || !header.value().isHeader() || !header.value().isData()) return facts;

  bool claimsSeal = header.value().isSealed();
  if (sizeBytes >= 2 * kHeaderSize) {
    OBD_RETURN_IF_ERROR(file->preadExact(bytes, sizeBytes - kHeaderSize));
    const Result<LayerHeader> trailer = decodeHeader(bytes);
    claimsSeal = claimsSeal || (trailer.isOk() && !trailer.value().isHeader() && trailer.value().isSealed());
  }
  if (!claimsSeal) {
    facts.kind = "lsmt-writable";
    facts.virtualSizeBytes = header.value().virtualSize;
    return facts;
  }
  OBD_ASSIGN_OR_RETURN(const auto layer, LayerReader::open(std::move(file)));
  facts.kind = "lsmt-sealed";
  facts.virtualSizeBytes = layer->virtualSize();
  return facts;
}

Status sealUpper(const std::string& data, const std::string& index) {
  Result<std::unique_ptr<Upper>> upper = openUpper(data, index, OpenUpperOptions{});
  if (upper.code() == Code::kNotFound) {
    // The index goes last when a layer is sealed: without it the data file may be finished already.
    const auto facts = inspectLayer(data);
    if (facts.isOk() && std::string_view(facts.value().kind) == "lsmt-sealed") return Status::ok();
  }
  if (!upper.isOk()) return upper.status();
  return upper.value()->seal();
}

}  // namespace

void addLayers(Napi::Env env, Napi::Object exports) {
  exports.Set("createUpper", promising(env, "createUpper", [](const Napi::CallbackInfo& info) {
                const Napi::Object options = objectFrom(info[0], "options");
                const std::string data = stringFrom(options.Get("data"), "data");
                const std::string index = stringFrom(options.Get("index"), "index");
                CreateUpperOptions create;
                create.virtualSize = uint64From(options.Get("virtualSizeBytes"), "virtualSizeBytes");
                create.sparse = boolFrom(options.Get("sparse"), "sparse");
                const Napi::Value parent = options.Get("parentUuid");
                if (!parent.IsNull()) {
                  const std::optional<Uuid> uuid = Uuid::parse(stringFrom(parent, "parentUuid"));
                  if (!uuid) throwBadArgument(info.Env(), "parentUuid must be a UUID or null");
                  create.parentUuid = *uuid;
                }
                return startTask(info.Env(), Where::kThread, [=] { return createUpper(data, index, create); });
              }));
  exports.Set("sealUpper", promising(env, "sealUpper", [](const Napi::CallbackInfo& info) {
                const std::string data = stringFrom(info[0], "data");
                const std::string index = stringFrom(info[1], "index");
                return startTask(info.Env(), Where::kThread, [=] { return sealUpper(data, index); });
              }));
  exports.Set("inspectLayer", promising(env, "inspectLayer", [](const Napi::CallbackInfo& info) {
                const std::string path = stringFrom(info[0], "path");
                return Task<LayerFacts>::start(
                    info.Env(), Where::kThread, [=] { return inspectLayer(path); },
                    [](Napi::Env there, LayerFacts& facts) -> Napi::Value {
                      Napi::Object out = Napi::Object::New(there);
                      out.Set("kind", facts.kind);
                      out.Set("virtualSizeBytes", toJs(there, facts.virtualSizeBytes));
                      out.Set("tar", toJs(there, facts.wrappers.tar));
                      out.Set("zfile", toJs(there, facts.wrappers.zfile));
                      return out;
                    });
              }));
}

}  // namespace obd::addon
