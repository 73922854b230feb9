// Every operation for one instruction set. CMake compiles this once for each line of list.h, with its flags and
// -DSECATEUR_ISA=<name>.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of such a function, and
// could take the one made for a wider instruction set and run it on a machine that lacks it.
//
// One thread computes each row of y, in an order that does not depend on the number of threads. Results do not either.
#include "isa/table.h"

#define SECATEUR_TABLE_OF(isa) table_##isa
#define SECATEUR_TABLE(isa) SECATEUR_TABLE_OF(isa)

namespace secateur {

extern const Table SECATEUR_TABLE(SECATEUR_ISA);
const Table SECATEUR_TABLE(SECATEUR_ISA) = {
#define OP(file, function, Arguments) SECATEUR_ISA::function,
#include "ops/list.h"
};

}  // namespace secateur
