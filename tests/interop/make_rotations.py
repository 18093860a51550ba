"""Writes the fixtures of tests/it/export/torch.rs with torch.save: R.bin, R_parameters.bin and the same values in R.safetensors.

    python tests/interop/make_rotations.py tests/interop
"""

import collections
import pathlib
import sys

import torch
from safetensors.torch import save_file

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0].float().contiguous()


layers = 2
rotations = {"R1": orthogonal(8)}
for layer in range(layers):
    rotations[f"model.layers.{layer}.self_attn.R2"] = orthogonal(4)

# As the published code saves them.
torch.save(rotations, folder / "R.bin")

# As a module's state dictionary might be: ordered, with attributes, parameters, a transposed view, one storage for two tensors.
stacked = torch.stack([rotations[f"model.layers.{layer}.self_attn.R2"] for layer in range(layers)])
state = collections.OrderedDict()
state["R1"] = torch.nn.Parameter(rotations["R1"].T.contiguous().T)
for layer in range(layers):
    state[f"model.layers.{layer}.self_attn.R2"] = stacked[layer]
state._metadata = collections.OrderedDict(version=1)
torch.save(state, folder / "R_parameters.bin")

save_file({"R1": rotations["R1"], "R2": stacked.contiguous()}, folder / "R.safetensors")
