// What every library made of the kernels has, whether it is Python's module or one for an engine: the instruction sets
// of this build and this machine.
#pragma once
#include "isa/table.h"

namespace secateur {

struct InstructionSet {
    const char* name;
    bool supported;  // by this machine
    const Table& table;
};

// Widest first. The last one has no name.
extern const InstructionSet instruction_sets[];

// The one of this name, or null if this build or this machine lacks it.
const InstructionSet* find_instruction_set(const char* name);

}  // namespace secateur
