// PackedLinear for ONNX Runtime: SessionOptions.register_custom_ops_library(this library).
#include <climits>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "engines/onnxruntime_api.h"
#include "engines/packed.h"
#include "fork.h"

namespace secateur {
namespace {

using namespace ort;

// The entry of a session's settings that says how many threads it has: the interface does not tell an operation.
constexpr char kThreads[] = "secateur.threads";

const Api* api;  // of the process: one ONNX Runtime runs in it

// The node that runs on this thread, whose session's threads fork uses.
thread_local const KernelContext* running;

// Ends a function with the error of a call.
#define SECATEUR_CALL(...) \
    if (Status* status = (__VA_ARGS__)) return status

Status* failed(const std::string& reason) {
    return api->CreateStatus(kInvalidArgument, ("secateur: " + reason).c_str());
}

// A tensor as ONNX Runtime describes it.
struct Tensor {
    float* data = nullptr;
    size_t count = 0;
    std::vector<int64_t> sizes;

    Status* read(const Value* value) {
        TensorInfo* info;
        SECATEUR_CALL(api->GetTensorTypeAndShape(value, &info));
        const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> owner(info, api->ReleaseTensorTypeAndShapeInfo);
        size_t rank;
        SECATEUR_CALL(api->GetDimensionsCount(info, &rank));
        sizes.resize(rank);
        SECATEUR_CALL(api->GetDimensions(info, sizes.data(), rank));
        SECATEUR_CALL(api->GetTensorShapeElementCount(info, &count));
        return data_of(value);
    }
    Status* data_of(const Value* value) {
        void* found;
        SECATEUR_CALL(api->GetTensorMutableData(const_cast<Value*>(value), &found));
        data = static_cast<float*>(found);
        return nullptr;
    }
};

struct Kernel {
    PackedWeight weight;
    int threads;

    Status* run(KernelContext* context) const {
        size_t inputs;
        SECATEUR_CALL(api->KernelContext_GetInputCount(context, &inputs));
        const Value *given_x, *given_bias = nullptr;
        Tensor x, bias, y;
        SECATEUR_CALL(api->KernelContext_GetInput(context, 0, &given_x));
        SECATEUR_CALL(x.read(given_x));
        if (inputs > 2) SECATEUR_CALL(api->KernelContext_GetInput(context, 2, &given_bias));
        if (given_bias) SECATEUR_CALL(bias.read(given_bias));
        if (x.sizes.empty() || x.sizes.back() != weight.columns())
            return failed("the input of PackedLinear should have " + std::to_string(weight.columns()) +
                          " features, got " + (x.sizes.empty() ? "a number" : std::to_string(x.sizes.back())) + ".");
        if (given_bias && int64_t(bias.count) != weight.rows())
            return failed("the bias of PackedLinear should have " + std::to_string(weight.rows()) + " numbers, got " +
                          std::to_string(bias.count) + ".");
        const int64_t batch = int64_t(x.count) / weight.columns();
        x.sizes.back() = weight.rows();
        Value* result;
        SECATEUR_CALL(api->KernelContext_GetOutput(context, 0, x.sizes.data(), x.sizes.size(), &result));
        SECATEUR_CALL(y.data_of(result));
        running = context;
        weight.run(x.data, y.data, bias.data, batch, threads);
        running = nullptr;
        return nullptr;
    }
};

// The operation of one session.
struct PackedLinear : CustomOp {
    int threads;

    explicit PackedLinear(int threads) : threads(threads) {
        GetName = [](const CustomOp*) { return "PackedLinear"; };
        GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
        GetInputType = [](const CustomOp*, size_t index) { return index == 1 ? kUint8 : kFloat; };
        GetInputTypeCount = [](const CustomOp*) { return size_t(3); };
        GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
        GetOutputTypeCount = [](const CustomOp*) { return size_t(1); };
        GetInputCharacteristic = [](const CustomOp*, size_t index) { return index == 2 ? 1 : 0; };
        GetOutputCharacteristic = [](const CustomOp*, size_t) { return 0; };
        GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
        GetStartVersion = [](const CustomOp*) { return 1; };
        GetEndVersion = [](const CustomOp*) { return INT_MAX; };
        CreateKernelV2 = [](const CustomOp* op, const Api*, const KernelInfo* info, void** kernel) {
            return make(*static_cast<const PackedLinear*>(op), info, kernel);
        };
        KernelComputeV2 = [](void* kernel, KernelContext* context) -> Status* {
            try {
                return static_cast<const Kernel*>(kernel)->run(context);
            } catch (const std::exception& error) {
                return failed(error.what());
            }
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    }

    static Status* make(const PackedLinear& op, const KernelInfo* info, void** kernel) {
        int constant = 0;
        const Value* value = nullptr;
        SECATEUR_CALL(api->KernelInfoGetConstantInput_tensor(info, 1, &constant, &value));
        if (!constant || !value) return failed("the weight of PackedLinear should be a constant of the model.");
        try {
            Tensor bytes;
            SECATEUR_CALL(bytes.read(value));
            *kernel = new Kernel{PackedWeight(bytes.data, bytes.count), op.threads};
            return nullptr;
        } catch (const std::exception& error) {
            return failed(error.what());
        }
    }
};

int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof(set), &set)) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? int(count) : 1;
}

// More threads than the session has do no harm but for some waiting: they run one after the other.
Status* threads_of(const SessionOptions* options, int& threads) {
    threads = processors();
    int found = 0;
    SECATEUR_CALL(api->HasSessionConfigEntry(options, kThreads, &found));
    if (!found) return nullptr;
    char value[16] = {};
    size_t size = sizeof(value);
    SECATEUR_CALL(api->GetSessionConfigEntry(options, kThreads, value, &size));
    const int given = std::atoi(value);
    if (given < 1 || given > 4096)
        return failed(std::string(kThreads) + " should be a number of threads, got " + value + ".");
    threads = given;
    return nullptr;
}

Status* add(SessionOptions* options) {
    int threads;
    SECATEUR_CALL(threads_of(options, threads));
    // These stay until the process ends, because the session uses them, and nothing says when it ends.
    Domain* domain;
    SECATEUR_CALL(api->CreateCustomOpDomain("secateur", &domain));
    SECATEUR_CALL(api->CustomOpDomain_Add(domain, new PackedLinear(threads)));
    return api->AddCustomOpDomain(options, domain);
}

}  // namespace

void fork(int threads, void (*part)(void* data, int thread, int of), void* data) {
    struct Call {
        void (*part)(void*, int, int);
        void* data;
        int of;
    } call = {part, data, threads};
    const auto one = [](void* given, size_t i) {
        const Call& call = *static_cast<const Call*>(given);
        call.part(call.data, int(i), call.of);
    };
    Status* status = api->KernelContext_ParallelFor(running, one, size_t(threads), size_t(threads), &call);
    if (!status) return;
    api->ReleaseStatus(status);  // nothing has run
    for (int i = 0; i < threads; ++i) one(&call, size_t(i));
}

}  // namespace secateur

extern "C" __attribute__((visibility("default"))) secateur::ort::Status* RegisterCustomOps(
    secateur::ort::SessionOptions* options, const secateur::ort::ApiBase* base) {
    using namespace secateur;
    api = base->GetApi(ort::kVersion);
    if (!api) {
        const ort::Api* oldest = base->GetApi(1);
        const std::string reason = std::string("secateur: PackedLinear needs ONNX Runtime 1.17 or later, this is ") +
                                   base->GetVersionString() + ". Upgrade onnxruntime.";
        return oldest ? oldest->CreateStatus(ort::kFail, reason.c_str()) : nullptr;
    }
    try {
        return add(options);
    } catch (const std::exception& error) {
        return failed(error.what());
    }
}
