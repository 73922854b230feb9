// The Python module: which instruction sets this machine has, one function for each layout, and those of the mask of
// secateur.nn. Tensors come as addresses, so that nothing of torch is linked and one build serves every version of it;
// the Python side checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace nb = nanobind;

namespace secateur {

namespace {

struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[2];

bool has(const std::string& isa) {
    if (isa == "generic") return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("lzcnt");
    if (isa == "avx2") return avx2;
    if (isa == "avx512")
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#endif
    return false;
}

const Table& table(const std::string& isa) {
    if (has(isa)) {
#if defined(__x86_64__)
        if (isa == "avx512") return table_avx512;
        if (isa == "avx2") return table_avx2;
#endif
        if (isa == "generic") return table_generic;
    }
    throw std::invalid_argument("this machine cannot run the instruction set '" + isa + "'");
}

#if defined(__x86_64__)
const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
const bool intel = false;
#endif

// Asks for large pages under memory that has not been written yet. Only a hint: what cannot be had is done without.
void advise(uintptr_t address, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 4096, first = (address + page - 1) / page * page, last = (address + uintptr_t(bytes)) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

template <class P> const P* at(uintptr_t address) { return reinterpret_cast<const P*>(address); }

Call call(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t scale, uintptr_t values, int64_t batch, int64_t rows,
          int64_t columns, int value_type, int threads) {
    return {at<float>(x), reinterpret_cast<float*>(y), at<float>(bias), at<float>(scale), at<void>(values), batch, rows,
            columns, value_type, threads, intel};
}

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

#define CALL_ARGUMENTS                                                                                                  \
    uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t scale, uintptr_t values, int64_t batch, int64_t rows,           \
        int64_t columns, int value_type, int threads
#define THE_CALL call(x, y, bias, scale, values, batch, rows, columns, value_type, threads)
#define GATE_ARGUMENTS                                                                                                  \
    uintptr_t weight, uintptr_t threshold, float temperature, int64_t competitions, int64_t units, bool each,           \
        bool solved, bool hard, int threads
#define THE_GATE {at<float>(weight), at<float>(threshold), temperature, competitions, units, each, solved, hard, threads}

#define UNIT_ARGUMENTS int64_t rows, int64_t columns, int64_t height, int64_t width, int threads
#define THE_UNITS {rows, columns, height, width, threads}

NB_MODULE(_native, m) {
    using namespace secateur;
    m.doc() = "The kernels. Addresses are not checked: use secateur.kernels.linear and secateur.nn.";
    using Released = nb::call_guard<nb::gil_scoped_release>;
    m.def("has", &has, nb::arg("isa"));
    m.def("advise", &advise, nb::arg("address"), nb::arg("bytes"));
    m.def("bitmask", [](const char* isa, CALL_ARGUMENTS, uintptr_t mask, uintptr_t offsets) {
        table(isa).bitmask(THE_CALL, {at<uint64_t>(mask), at<int64_t>(offsets)});
    }, Released());
    m.def("panels", [](const char* isa, CALL_ARGUMENTS, uintptr_t index, uintptr_t counts, uintptr_t offsets, int64_t height,
                       int64_t width, int index_bytes) {
        table(isa).panels(THE_CALL, {at<void>(index), at<uint16_t>(counts), at<int64_t>(offsets), height, width, index_bytes});
    }, Released());
    m.def("lanes", [](const char* isa, CALL_ARGUMENTS, uintptr_t words, int kept, int group) {
        table(isa).lanes(THE_CALL, {at<uint32_t>(words), kept, group});
    }, Released());
    m.def("strips", [](const char* isa, CALL_ARGUMENTS, uintptr_t block_columns, uintptr_t block_rows, int64_t height,
                       int64_t width) {
        table(isa).strips(THE_CALL, {at<int32_t>(block_columns), at<int64_t>(block_rows), height, width});
    }, Released());
    m.def("gate", [](const char* isa, GATE_ARGUMENTS, uintptr_t out) {
        table(isa).gate(THE_GATE, reinterpret_cast<float*>(out));
    }, Released());
    m.def("gate_backward", [](const char* isa, GATE_ARGUMENTS, uintptr_t grad, uintptr_t out, uintptr_t by_threshold) {
        table(isa).gate_backward(THE_GATE, at<float>(grad), reinterpret_cast<float*>(out),
                                 reinterpret_cast<float*>(by_threshold));
    }, Released());
    m.def("unit_sums", [](const char* isa, UNIT_ARGUMENTS, uintptr_t a, uintptr_t b, uintptr_t out) {
        table(isa).unit_sums(THE_UNITS, at<float>(a), at<float>(b), reinterpret_cast<float*>(out));
    }, Released());
    m.def("times_units", [](const char* isa, UNIT_ARGUMENTS, uintptr_t a, uintptr_t by_a, uintptr_t b, uintptr_t by_b,
                            uintptr_t out) {
        table(isa).times_units(THE_UNITS, at<float>(a), at<float>(by_a), at<float>(b), at<float>(by_b),
                               reinterpret_cast<float*>(out));
    }, Released());
}
