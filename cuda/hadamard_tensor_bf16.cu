#include "hadamard_tensor.cuh"

template int sq::launch_tensor<__nv_bfloat16>(const sq::Job &);
