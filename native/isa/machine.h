// What only the running machine can tell, beyond its instruction sets.
#pragma once

namespace secateur {

// Whether the expand instruction on 16 lanes costs about as much as a permutation, as Intel's does. On Zen 4 it costs
// five times that.
extern const bool fast_wide_expand;

}  // namespace secateur
