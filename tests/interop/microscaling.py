"""Writes tests/fixtures/formats/microscaling.json: blocks that compressed-tensors (0.12 or later) packs, for tests/it/formats.rs.

Scales are those of the formats' specifications, found here in float64; elements, ties and the order in a byte are compressed-tensors'.
Usage: python tests/interop/microscaling.py tests/fixtures/formats/microscaling.json
"""

import json
import sys

import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4

torch.manual_seed(0)
x = torch.randn(4, 64) * torch.tensor([1.0, 30.0, 1e-3, 0.25])[:, None]
# Every tie and every element, exactly.
ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0]
x[3, :32] = torch.tensor(ties + [v / 2 for v in ties[:-1]] + [4.5])
out = {"x": x.tolist()}

blocks = x.double().reshape(4, -1, 32).abs().amax(-1)
exponents = torch.floor(torch.log2(blocks)) - 2
packed = quantize_and_pack_fp4(x, torch.exp2(exponents).float(), global_scale=None, zero_point=None, group_size=32)
out["mxfp4"] = {"codes": packed.tolist(), "scales": (exponents + 127).int().tolist()}

most = x.abs().max()
unit = most / (6 * 448)
blocks = x.reshape(4, -1, 16).abs().amax(-1)
scales = (blocks / 6 / unit).to(torch.float8_e4m3fn)
packed = quantize_and_pack_fp4(x, scales.float() * unit, global_scale=None, zero_point=None, group_size=16)
out["nvfp4"] = {"codes": packed.tolist(), "scales": scales.view(torch.uint8).tolist(), "unit": unit.item()}

with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(out, file)
    file.write("\n")
