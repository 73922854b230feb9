// compile: -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
// compile: -mavx512vnni
// refines: avx512
// Dot products of bytes: Intel servers since Cascade Lake (2019), AMD since Zen 4 (2022).
#pragma once
#include "simd/avx512.h"
