"""Compares what `cargo run --example interop -- write DIR` wrote with transformers and torch, and writes rotations for `read DIR`.

    python tests/interop/check.py DIR
"""

import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder = pathlib.Path(sys.argv[1])
failures = 0


def report(what, good, detail=""):
    global failures
    failures += not good
    print("ok  " if good else "FAIL", what, detail)


def logits(path, tokens):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    report(f"{path}: norms are folded", all((p == 1).all() for n, p in model.named_parameters() if "norm" in n) or "source" in str(path))
    with torch.no_grad():
        return model(tokens).logits.flatten(0, 1)


for case in ["gqa", "tied", "llama3", "bias"]:
    ours = load_file(folder / case / "ours.safetensors")
    tokens = ours["tokens"].long()
    for name, wanted in [("source", "logits"), ("hf", "logits"), ("hf-w4", "logits-w4"), ("hf-gptq", "logits-gptq")]:
        got = logits(folder / case / name, tokens)
        error = (got - ours[wanted]).abs().max().item()
        report(f"{case}/{name}: logits agree", error < 1e-3, f"max|difference| {error:.1e}, max|logit| {got.abs().max().item():.2f}")
    for a, b in [("logits", "logits-w4"), ("logits", "logits-gptq"), ("logits-w4", "logits-gptq")]:
        different = (ours[a] - ours[b]).abs().max().item()
        report(f"{case}: {a} and {b} differ", different > 1e-2, f"by {different:.1e}")

for kind in ["f32", "f64"]:
    read = torch.load(folder / f"R-{kind}.bin", weights_only=True)
    want = load_file(folder / f"R-{kind}.safetensors")
    layers = len(want["R2"])
    keys = ["R1"] + [f"model.layers.{layer}.self_attn.R2" for layer in range(layers)]
    same = list(read) == keys and torch.equal(read["R1"], want["R1"])
    same = same and all(torch.equal(read[key], want["R2"][layer]) for layer, key in enumerate(keys[1:]))
    report(f"torch.load reads R-{kind}.bin to the bit", same and read["R1"].dtype == want["R1"].dtype)
    mapped = torch.load(folder / f"R-{kind}.bin", weights_only=True, mmap=True)
    report(f"torch.load maps R-{kind}.bin", torch.equal(mapped["R1"], want["R1"]))
    # The other way round: as the published code writes.
    torch.save(read, folder / f"torch-{kind}.bin")
    save_file({"R1": read["R1"], "R2": torch.stack([read[key] for key in keys[1:]])}, folder / f"torch-{kind}.safetensors")

print("all agree" if failures == 0 else f"{failures} differ")
sys.exit(failures > 0)
