#define SECATEUR_ISA_NAMESPACE isa_avx2
#define SECATEUR_ISA_NAME "avx2"
#define SECATEUR_TABLE table_avx2
#include "kernels.inc"
