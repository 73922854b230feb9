// The instruction sets, widest first: ISA(name, processor, whether this machine has it).
//
// To add one, write simd/NAME.h and add its line here. That header's first line names the compiler's flags. CMake reads
// both, and compiles isa.cpp once for each line whose processor it builds for. On 64-bit ARM, for example:
//
//     ISA(neon, aarch64, true)
//
// A refinement of another one has better instructions for bytes: its header's second line names the one that it
// refines, whose other operations it takes.
//
// The module evaluates the last column and is compiled without those flags, so that it runs on every machine.
#define SECATEUR_HAS_AVX2                                                                                    \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&     \
     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c") && \
     __builtin_cpu_supports("lzcnt"))
#define SECATEUR_HAS_AVX512                                                                          \
    (SECATEUR_HAS_AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
ISA(avx512_vbmi2, x86_64,
    SECATEUR_HAS_AVX512&& __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2"))
ISA(avx512_vnni, x86_64, SECATEUR_HAS_AVX512&& __builtin_cpu_supports("avx512vnni"))
ISA(avx512, x86_64, SECATEUR_HAS_AVX512)
ISA(avx2_vnni, x86_64, SECATEUR_HAS_AVX2&& __builtin_cpu_supports("avxvnni"))
ISA(avx2, x86_64, SECATEUR_HAS_AVX2)
ISA(generic, any, true)
#undef ISA
