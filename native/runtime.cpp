#include "runtime.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "isa/machine.h"
#include "scratch.h"

// An entry of isa/list.h counts where its processor is the one that is compiled for.
#define SECATEUR_ON_any(...) __VA_ARGS__
#if defined(__x86_64__)
#define SECATEUR_ON_x86_64(...) __VA_ARGS__
#else
#define SECATEUR_ON_x86_64(...)
#endif
#if defined(__aarch64__)
#define SECATEUR_ON_aarch64(...) __VA_ARGS__
#else
#define SECATEUR_ON_aarch64(...)
#endif

namespace secateur {

#define ISA(name, processor, supported) SECATEUR_ON_##processor(extern const Table table_##name;)
#include "isa/list.h"

#if defined(__x86_64__)
const bool fast_wide_expand = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
const bool fast_wide_expand = false;
#endif

const InstructionSet instruction_sets[] = {
#define ISA(name, processor, supported) SECATEUR_ON_##processor({#name, supported, table_##name}, )
#include "isa/list.h"
    {nullptr, false, table_generic},
};

const InstructionSet* find_instruction_set(const char* name) {
    for (const InstructionSet* isa = instruction_sets; isa->name; ++isa)
        if (!std::strcmp(isa->name, name)) return isa->supported ? isa : nullptr;
    return nullptr;
}

namespace {

struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[3];

}  // namespace

void* scratch(Slot slot, int64_t bytes) {
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes || !buffer.data) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096 + 4096;
        buffer.data = std::aligned_alloc(64, size_t(buffer.size));
        if (!buffer.data) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

}  // namespace secateur
