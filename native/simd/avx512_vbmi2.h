// compile: -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
// compile: -mavx512vnni -mavx512vbmi -mavx512vbmi2
// refines: avx512
// And bytes that are expanded by a mask: Intel since Ice Lake (2019), AMD since Zen 4 (2022).
#pragma once
#include "simd/avx512.h"
