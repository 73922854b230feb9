// The operations: OP(file, function, its arguments), and BYTES for those that multiply bytes.
//
// To add one, write ops/FILE.h with a struct of arguments and a function that takes it, and add its line here. The
// tables of function pointers and the Python functions come from this list. Arguments that derive from Linear become a
// class, which is made once for a weight.
//
// Processors of one width differ in their instructions for bytes. So BYTES is compiled once for each line of
// isa/list.h, and OP only for those that are no refinement of another.
#if !defined(BYTES)
#define BYTES OP
#endif
OP(bitmask, bitmask, Bitmask)
OP(panels, panels, Panels)
OP(groups, groups, Groups)
OP(tiles, tiles, Tiles)
OP(gate, gate, GateForward)
OP(gate, gate_backward, GateBackward)
OP(units, unit_sums, UnitSums)
OP(units, times_units, TimesUnits)
BYTES(int8_panels, int8_panels, Int8Panels)
BYTES(int8_tiles, int8_tiles, Int8Tiles)
BYTES(int8_bitmask, int8_bitmask, Int8Bitmask)
BYTES(int4_panels, int4_panels, Int4Panels)
BYTES(int4_bitmask, int4_bitmask, Int4Bitmask)
#undef OP
#undef BYTES
