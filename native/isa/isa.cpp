// Every operation for one instruction set. CMake compiles this once for each line of list.h, with its flags,
// -DSECATEUR_ISA=<name>, and for a refinement -DSECATEUR_BASE=<the one that it refines>.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of such a function, and
// could take the one made for a wider instruction set and run it on a machine that lacks it.
//
// One thread computes each row of y, in an order that does not depend on the number of threads. Results do not either.
#include "isa/table.h"

#define SECATEUR_TABLE_OF(isa) table_##isa
#define SECATEUR_TABLE(isa) SECATEUR_TABLE_OF(isa)

// A refinement takes all operations but those on bytes from the instruction set that it refines.
#if !defined(SECATEUR_BASE)
#define SECATEUR_BASE SECATEUR_ISA
#define SECATEUR_DEFINES_OPERATIONS
#endif

namespace secateur {

namespace SECATEUR_BASE {
#define OP(file, function, Arguments) void function##_operation(const Arguments&);
#define BYTES(file, function, Arguments)
#include "ops/list.h"
#if defined(SECATEUR_DEFINES_OPERATIONS)
#define OP(file, function, Arguments) \
    void function##_operation(const Arguments& arguments) { function(arguments); }
#define BYTES(file, function, Arguments)
#include "ops/list.h"
#endif
}  // namespace SECATEUR_BASE

extern const Table SECATEUR_TABLE(SECATEUR_ISA);
const Table SECATEUR_TABLE(SECATEUR_ISA) = {
#define OP(file, function, Arguments) SECATEUR_BASE::function##_operation,
#define BYTES(file, function, Arguments) SECATEUR_ISA::function,
#include "ops/list.h"
};

}  // namespace secateur
