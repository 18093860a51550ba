#include "hadamard_tensor.cuh"

template int sq::launch_tensor<__half>(const sq::Job &);
