#include "hadamard_tensor.cuh"

template int sq::launch_tensor<float>(const sq::Job &);
