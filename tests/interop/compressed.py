"""Compares what `cargo run --example interop -- compressed DIR` wrote with compressed-tensors and transformers.

    python tests/interop/compressed.py DIR

For every folder: quantization_config passes the classes of compressed-tensors; its own code unpacks every tensor to the bits that we read,
and packs the same words from them; transformers loads the folder and computes our logits; where activations are quantised, with the codes that its library
makes of our values. An online R4 is run by its own transforms.
"""

import json
import pathlib
import sys
import warnings

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

warnings.filterwarnings("ignore")
transformers.utils.logging.disable_progress_bar()
SITES = {"q_proj": "attention_input", "o_proj": "attention_output", "gate_proj": "mlp_input", "down_proj": "down_input"}
failures = 0


def report(what, good, detail=""):
    global failures
    failures += not good
    print("ok  " if good else "FAIL", what, detail)


def same_packing(folder, ours, config):
    """Of every linear: what compressed-tensors unpacks, and what it packs from that."""
    tensors = load_file(folder / "compressed/model.safetensors")
    unpacked = repacked = True
    for name, want in ours.items():
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        group = "group_1" if "group_1" in config.config_groups and module.endswith("o_proj") else "group_0"
        scheme = config.config_groups[group]
        packed = {k.removeprefix(module + "."): t for k, t in tensors.items() if k.startswith(module + ".weight_")}
        unpacked &= torch.equal(PackedQuantizationCompressor.decompress(packed, scheme)["weight"].float(), want)
        # In f32 nothing is rounded away that tells codes of 8 bits apart.
        wide = PackedQuantizationCompressor.decompress(packed | {"weight_scale": packed["weight_scale"].float()}, scheme)
        again = PackedQuantizationCompressor.compress(wide, scheme)
        repacked &= all(torch.equal(again[k], packed[k]) for k in packed if k != "weight_scale")
    report(f"{folder.name}: compressed-tensors unpacks our tensors to the bit", unpacked)
    report(f"{folder.name}: and packs them to the bit", repacked)


def run(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.flatten(0, 1).float()


def same_codes(folder, ours, model):
    """Of every input that is quantised: what compressed-tensors makes of the values that we quantised. From end to end a code that rounds
    the other way moves all behind it, and the largest magnitude of every symmetric row lies on a tie."""
    total = different = 0
    worst = 0.0
    for name, module in model.named_modules():
        site = SITES.get(name.rsplit(".", 1)[-1])
        args = getattr(getattr(module, "quantization_scheme", None), "input_activations", None) if site else None
        if args is None:
            continue
        at = f"{name.split('.')[2]}.{site}"
        value = ours[at + ".values"]
        scale, zero = compute_dynamic_scales_and_zp(value=value, args=args, module=module)
        # Our codes of an asymmetric grid start at 0, theirs at -2^(bits-1).
        mine = ours[at + ".codes"] - (0 if args.symmetric else 2 ** (args.num_bits - 1))
        apart = quantize(value, scale, zero, args) != mine
        scale = scale.repeat_interleave(args.group_size, -1) if args.group_size else scale
        total, different = total + mine.numel(), different + apart.sum().item()
        if apart.any():
            worst = max(worst, ((value / scale) % 1 - 0.5).abs()[apart].max().item())
    if total:
        report(f"{folder.name}: codes of activations agree except at ties", worst < 1e-4, f"{different} of {total} differ, {worst:.0e} from a tie")


print("torch", torch.__version__, "transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
for folder in sorted(p for p in pathlib.Path(sys.argv[1]).iterdir() if (p / "ours.safetensors").exists()):
    ours = load_file(folder / "ours.safetensors")
    tokens = ours["tokens"].long()
    said = json.loads((folder / "compressed/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    report(f"{folder.name}: quantization_config is valid", config.quantization_status == QuantizationStatus.COMPRESSED)
    same_packing(folder, ours, config)

    # Packed zero points load only by way of a dense model: the packed one is laid out for unpacked ones.
    dense = {} if said["config_groups"]["group_0"]["weights"]["symmetric"] else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder / "compressed", **dense).eval()
    targets = {n for scheme in config.config_groups.values() for n, _ in match_named_modules(model, scheme.targets, config.ignore)}
    online = said.get("transform_config") or {}
    report(f"{folder.name}: 7 linears of each layer are quantised", len(targets) == 7 * model.config.num_hidden_layers)
    narrow = run(model, tokens)
    if online:
        # The other half is in the weight; transformers itself ignores both.
        transforms = TransformConfig.model_validate(online)
        for scheme in transforms.config_groups.values():
            scheme.apply = [args for args in scheme.apply if args.location == "input"]
        report(f"{folder.name}: transform_config is valid", list(transforms.config_groups) == ["R4"])
        apart = (narrow - ours["logits"]).abs().max().item()
        report(f"{folder.name}: without R4 it is another network", apart > 0.1, f"max|difference| {apart:.1e}")
        apply_transform_config(model, transforms)
        narrow = run(model, tokens)
    same_codes(folder, ours, model)
    got = run(torch.nn.Module.float(model), tokens)  # unpacked by now
    spread = ours["logits"].std().item()
    bits = (said["config_groups"]["group_0"]["input_activations"] or {"num_bits": 16})["num_bits"]
    error, rms = (got - ours["logits"]).abs().max().item(), (got - ours["logits"]).pow(2).mean().sqrt().item()
    detail = f"max|difference| {error:.1e}, rms {rms:.1e}, deviation {spread:.2f}"
    if bits == 16:
        report(f"{folder.name}: logits in f32 agree", error < 1e-4, detail)
    else:  # where rounding differs
        report(f"{folder.name}: logits in f32 are near", rms < {8: 0.05, 4: 0.6}[bits] * spread, detail)
    if folder.name.endswith("bf16") and bits == 16:
        rms = (narrow - ours["logits"]).pow(2).mean().sqrt().item() / spread
        report(f"{folder.name}: logits in bf16 agree", rms < 0.03, f"rms difference {rms:.4f} of their deviation")

print("all agree" if failures == 0 else f"{failures} differ")
sys.exit(failures > 0)
