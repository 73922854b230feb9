#define SECATEUR_ISA_NAMESPACE isa_generic
#define SECATEUR_ISA_NAME "generic"
#define SECATEUR_TABLE table_generic
#include "kernels.inc"
