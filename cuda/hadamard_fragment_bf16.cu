#include "hadamard_fragment.cuh"

template int sq::launch_fragment<__nv_bfloat16>(const sq::Job &);
