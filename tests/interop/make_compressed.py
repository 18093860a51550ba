"""Makes tests/fixtures/compressed: models that compressed-tensors packs, and what it unpacks from them.

    python tests/interop/make_compressed.py tests/fixtures/compressed

Every folder holds a tiny random LLaMA, its config.json and model.safetensors as transformers would save them, and weights.safetensors:
the linears as compressed-tensors unpacks them.
"""

import json
import pathlib
import sys

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

# A row of 24 columns at 3 bits ends inside a word, and its values run over the boundaries of words.
CASES = {
    "channel": (torch.bfloat16, dict(num_bits=4, symmetric=True, strategy="channel")),
    "group-asymmetric": (torch.float32, dict(num_bits=4, symmetric=False, strategy="group", group_size=8)),
    "channel-3-bits": (torch.float16, dict(num_bits=3, symmetric=False, strategy="channel")),
    "group-8-bits": (torch.bfloat16, dict(num_bits=8, symmetric=False, strategy="group", group_size=8)),
}

for number, (name, (dtype, args)) in enumerate(CASES.items()):
    torch.manual_seed(number)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=13,
        max_position_embeddings=64, attention_bias=name == "channel", tie_word_embeddings=name == "group-8-bits", dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.1, 0.25)
    args = QuantizationArgs(type="int", **args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    tensors, unpacked = {}, {}
    for key, value in model.state_dict().items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj"):
            if not (key == "lm_head.weight" and config.tie_word_embeddings):
                tensors[key] = value
            continue
        groups = value.unflatten(-1, (-1, args.group_size)) if args.group_size else value[:, None]
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        packed = PackedQuantizationCompressor.compress({"weight": value, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        tensors |= {f"{module}.{part}": t.contiguous() for part, t in packed.items()}
        unpacked[key] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    folder = pathlib.Path(sys.argv[1]) / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(unpacked, folder / "weights.safetensors")
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    said = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
    kept = [k for k in said if k in config.to_diff_dict() or k in ("attention_bias", "rms_norm_eps", "hidden_act", "head_dim", "tie_word_embeddings")]
    said = {k: said[k] for k in kept} | {"quantization_config": json.loads(quantization.model_dump_json())}
    (folder / "config.json").write_text(json.dumps(said, indent=1) + "\n")
