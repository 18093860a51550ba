"""Unpacks a native checkpoint with nothing but its documented layout (numpy and safetensors only) and prints what it holds.

    python tests/interop/unpack.py FOLDER
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(sys.argv[1])
record = json.loads((folder / "spinquant.json").read_text())
tensors = load_file(folder / "model.safetensors")
assert record["format"] == "spinquant-native" and record["format_version"] == 1
config, weights = record["config"], record["weights"]
q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
c, f = config["hidden_size"], config["intermediate_size"]
inputs = {"self_attn.o_proj": q, "mlp.down_proj": f}


def weight(name, columns):
    """scale · (code − zero), [out, in]"""
    codes, scale = tensors[name + ".codes"], tensors[name + ".scale"]
    if weights["stored_bits"] == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)[:, :columns]
    codes = codes.astype(scale.dtype) + weights["min_code"]
    group = weights["group"] or columns
    scale = np.repeat(scale, group, axis=1)
    zero = 0 if weights["symmetric"] else np.repeat(tensors[name + ".zero"], group, axis=1)
    return scale * (codes - zero)


for layer in range(config["num_hidden_layers"]):
    for linear in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]:
        w = weight(f"model.layers.{layer}.{linear}", inputs.get(linear, c))
        assert np.isfinite(w).all()
        print(f"layer {layer} {linear:18} {w.shape} rms {np.sqrt((w * w).mean()):.4f}, {len(np.unique(w[0]))} values in row 0")
        if layer == 0 and linear == "mlp.up_proj" and "R1" in tensors and len(sys.argv) > 2:
            # With the source folder at hand: the rotated weight that was rounded, gain and rotation undone.
            source = load_file(pathlib.Path(sys.argv[2]) / "model.safetensors")
            gain = source["model.layers.0.post_attention_layernorm.weight"]
            want = source["model.layers.0.mlp.up_proj.weight"] * gain @ tensors["R1"]
            error = np.abs(w - want).max() / np.abs(want).max()
            print(f"    from the source's weight: max relative difference {error:.3f}")
            assert error < 0.15
