#include "hadamard_fragment.cuh"

template int sq::launch_fragment<__half>(const sq::Job &);
