// The functions of one instruction set.
#pragma once
#include "operations.h"  // made by CMake: includes every file of ops/list.h

namespace secateur {

struct Table {
#define OP(file, function, Arguments) void (*function)(const Arguments&);
#include "ops/list.h"
};

}  // namespace secateur
