// The part of ONNX Runtime's C interface that our operation needs. Its package for Python has no header.
//
// ONNX Runtime promises that this table only grows: an entry keeps its place and its type in all later versions, and
// GetApi(17) returns the same table from a later ONNX Runtime. The places of the last entries of versions 1, 14, 15 and
// 17 are checked by ONNX Runtime itself where it defines the table.
#pragma once
#include <cstddef>
#include <cstdint>

namespace secateur::ort {

constexpr uint32_t kVersion = 17;  // ONNX Runtime 1.17, the first one whose threads an operation may use

struct Status;         // an error, or null
struct Value;          // a tensor
struct TensorInfo;     // its type and shape
struct KernelInfo;     // a node while it is made
struct KernelContext;  // a node while it runs
struct SessionOptions;
struct Domain;
struct CustomOp;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2 };

struct Api {
    Status* (*CreateStatus)(ErrorCode code, const char* message);  // 0
    void* others_1[25];
    Status* (*CreateCustomOpDomain)(const char* name, Domain** domain);  // 26
    Status* (*CustomOpDomain_Add)(Domain* domain, const CustomOp* op);
    Status* (*AddCustomOpDomain)(SessionOptions* options, Domain* domain);  // 28
    void* others_29[22];
    Status* (*GetTensorMutableData)(Value* value, void** data);  // 51
    void* others_52[8];
    Status* (*GetTensorElementType)(const TensorInfo* info, ElementType* type);  // 60
    Status* (*GetDimensionsCount)(const TensorInfo* info, size_t* count);
    Status* (*GetDimensions)(const TensorInfo* info, int64_t* sizes, size_t count);  // 62
    void* others_63[1];
    Status* (*GetTensorShapeElementCount)(const TensorInfo* info, size_t* count);  // 64
    Status* (*GetTensorTypeAndShape)(const Value* value, TensorInfo** info);       // 65
    void* others_66[22];
    Status* (*KernelContext_GetInputCount)(const KernelContext* context, size_t* count);  // 88
    void* others_89[1];
    Status* (*KernelContext_GetInput)(const KernelContext* context, size_t index, const Value** value);  // 90
    Status* (*KernelContext_GetOutput)(KernelContext* context, size_t index, const int64_t* sizes, size_t count,
                                       Value** value);  // 91
    void* others_92[1];
    void (*ReleaseStatus)(Status* status);  // 93
    void* others_94[5];
    void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo* info);  // 99
    void* others_100[1];
    void (*ReleaseCustomOpDomain)(Domain* domain);  // 101, the last one of version 1
    void* others_102[135];
    Status* (*HasSessionConfigEntry)(const SessionOptions* options, const char* key, int* found);  // 237
    Status* (*GetSessionConfigEntry)(const SessionOptions* options, const char* key, char* value,
                                     size_t* size);  // 238, the last one of version 14
    void* others_239[10];
    Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo* info, size_t index, int* is_constant,
                                                 const Value** value);  // 249
    void* others_250[24];
    Status* (*KernelContext_ParallelFor)(const KernelContext* context, void (*part)(void* data, size_t i), size_t count,
                                         size_t batches, void* data);  // 274
};
#define SECATEUR_PLACE(name, place) static_assert(offsetof(Api, name) == place * sizeof(void*))
SECATEUR_PLACE(CreateCustomOpDomain, 26);
SECATEUR_PLACE(GetTensorMutableData, 51);
SECATEUR_PLACE(GetTensorElementType, 60);
SECATEUR_PLACE(GetTensorTypeAndShape, 65);
SECATEUR_PLACE(KernelContext_GetOutput, 91);
SECATEUR_PLACE(ReleaseStatus, 93);
SECATEUR_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
SECATEUR_PLACE(ReleaseCustomOpDomain, 101);
SECATEUR_PLACE(GetSessionConfigEntry, 238);
SECATEUR_PLACE(KernelInfoGetConstantInput_tensor, 249);
SECATEUR_PLACE(KernelContext_ParallelFor, 274);
#undef SECATEUR_PLACE

struct ApiBase {
    const Api* (*GetApi)(uint32_t version);  // null if this ONNX Runtime is older than that
    const char* (*GetVersionString)();
};

// An operation: what ONNX Runtime asks about it, and its kernel.
struct CustomOp {
    uint32_t version = kVersion;
    void* (*CreateKernel)(const CustomOp* op, const Api* api, const KernelInfo* info) = nullptr;  // before version 16
    const char* (*GetName)(const CustomOp* op) = nullptr;
    const char* (*GetExecutionProviderType)(const CustomOp* op) = nullptr;
    ElementType (*GetInputType)(const CustomOp* op, size_t index) = nullptr;
    size_t (*GetInputTypeCount)(const CustomOp* op) = nullptr;
    ElementType (*GetOutputType)(const CustomOp* op, size_t index) = nullptr;
    size_t (*GetOutputTypeCount)(const CustomOp* op) = nullptr;
    void (*KernelCompute)(void* kernel, KernelContext* context) = nullptr;  // before version 16
    void (*KernelDestroy)(void* kernel) = nullptr;
    int (*GetInputCharacteristic)(const CustomOp* op, size_t index) = nullptr;  // 0 required, 1 optional
    int (*GetOutputCharacteristic)(const CustomOp* op, size_t index) = nullptr;
    int (*GetInputMemoryType)(const CustomOp* op, size_t index) = nullptr;  // 0 for the usual one
    int (*GetVariadicInputMinArity)(const CustomOp* op) = nullptr;
    int (*GetVariadicInputHomogeneity)(const CustomOp* op) = nullptr;
    int (*GetVariadicOutputMinArity)(const CustomOp* op) = nullptr;
    int (*GetVariadicOutputHomogeneity)(const CustomOp* op) = nullptr;
    Status* (*CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) = nullptr;
    Status* (*KernelComputeV2)(void* kernel, KernelContext* context) = nullptr;
    Status* (*InferOutputShapeFn)(const CustomOp* op, void* context) = nullptr;
    int (*GetStartVersion)(const CustomOp* op) = nullptr;
    int (*GetEndVersion)(const CustomOp* op) = nullptr;
    // Of version 18. ONNX Runtime does not read them from an operation of version 17.
    void* others[4] = {};
};

}  // namespace secateur::ort
