// compile: -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt -mavxvnni
// refines: avx2
// Dot products of bytes without AVX-512: Intel since Alder Lake (2021), AMD since Zen 5 (2024).
#pragma once
#include "simd/avx2.h"
