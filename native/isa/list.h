// The instruction sets, widest first: ISA(name, processor, whether this machine has it).
//
// To add one, write simd/NAME.h and add its line here. That header's first line names the compiler's flags. CMake reads
// both, and compiles isa.cpp once for each line whose processor it builds for. On 64-bit ARM, for example:
//
//     ISA(neon, aarch64, true)
//
// The module evaluates the last column and is compiled without those flags, so that it runs on every machine.
ISA(avx512, x86_64,
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
ISA(avx2, x86_64,
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("lzcnt"))
ISA(generic, any, true)
#undef ISA
