// Memory for one call of a kernel.
#pragma once
#include <cstdint>

namespace secateur {

enum Slot : int { kInput = 0, kWork = 1, kImage = 2 };

// A buffer of the calling thread, at least `bytes` long and aligned to 64 bytes. It is valid until the thread's next
// call with the same slot, and never shrinks. Throws std::bad_alloc.
void* scratch(Slot slot, int64_t bytes);

}  // namespace secateur
