#define SECATEUR_ISA_NAMESPACE isa_avx512
#define SECATEUR_ISA_NAME "avx512"
#define SECATEUR_TABLE table_avx512
#include "kernels.inc"
