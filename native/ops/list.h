// The operations: OP(file, function, its arguments).
//
// To add one, write ops/FILE.h with a struct of arguments and a function that takes it, and add its line here. The
// tables of function pointers and the Python functions come from this list. Arguments that derive from Linear become a
// class, which is made once for a weight.
OP(bitmask, bitmask, Bitmask)
OP(panels, panels, Panels)
OP(groups, groups, Groups)
OP(tiles, tiles, Tiles)
OP(gate, gate, GateForward)
OP(gate, gate_backward, GateBackward)
OP(units, unit_sums, UnitSums)
OP(units, times_units, TimesUnits)
#undef OP
