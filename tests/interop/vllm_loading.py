"""How far vLLM 0.33.0 gets with our folders of compressed-tensors on a machine without a GPU.

    pip download vllm==0.33.0 --no-deps                  # 336 MB; the wheel is not installed
    unzip -q vllm-0.33.0-*.whl 'vllm/*.py' -d VLLM
    python tests/interop/vllm_loading.py VLLM DIR

DIR is what `cargo run --example interop -- compressed DIR` wrote. vLLM's own Python runs, unchanged, as far as: `CompressedTensorsConfig`
reads `quantization_config` and `transform_config`; the linears of a layer are vLLM's classes, joined as its LLaMA joins them, and get their
quantisation methods from it; those register parameters; the parameters' own loaders take every tensor of the layer from the file, and they
hold its values then; an online R4 comes before down_proj alone, in blocks of its size, with a Hadamard of our own in the place of the kernel.

Stand-ins: every package and extension that this machine lacks (anything imported from a file of vLLM); a tensor-parallel group of one;
the choice of a kernel. So what the kernels compute is not seen, nor what they make of the weights after loading.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
import pathlib
import sys
import warnings
from unittest.mock import MagicMock

VERSION = "0.33.0"
HERE = __file__
warnings.filterwarnings("ignore")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import compressed_tensors  # noqa: E402,F401
import torch  # noqa: E402
import transformers  # noqa: E402,F401
from safetensors.torch import load_file  # noqa: E402

REAL = {"torch", "transformers", "compressed_tensors", "triton", "tensorflow", "flax", "sklearn", "torchvision", "torchaudio"}
# Asked for to find out about a platform: absent, not a stand-in.
ABSENT = {"torch_npu", "triton_kernels", "tpu_inference", "libtpu", "amdsmi", "pynvml"}
EXTENSIONS = {"vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._version"}
failures = 0
replaced = set()


def report(what, good, detail=""):
    global failures
    failures += not good
    print("ok  " if good else "FAIL", what, detail, flush=True)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, for files of vLLM alone, what nothing else finds."""

    def __init__(self, vllm):
        self.vllm = str(vllm)

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in REAL | ABSENT or (top == "vllm" and name not in EXTENSIONS):
            return None
        frame = sys._getframe(1)
        while frame and ("importlib" in frame.f_code.co_filename or frame.f_code.co_filename == HERE):
            frame = frame.f_back
        if not frame or not frame.f_code.co_filename.startswith(self.vllm):
            return None
        replaced.add(name if top == "vllm" else top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__name__, module.__path__, module.__spec__, module.__all__ = spec.name, [], spec, []
        return module

    def exec_module(self, module):
        pass


def patch(name, value):
    """Everywhere in vLLM where a function of this name was imported to."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and name in vars(module):
            setattr(module, name, value)


def hadamard(x):
    """The orthonormal transform of Sylvester's order along the last axis."""
    n, h = x.shape[-1], 1
    while h < n:
        pairs = x.unflatten(-1, (-1, 2, h))
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        h *= 2
    return x / n**0.5


class NoKernel:
    def __init__(self, config, **names):
        self.config = config

    def process_weights_after_loading(self, layer):
        pass


JOINED = {"self_attn.qkv_proj": [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")], "mlp.gate_up_proj": [("gate_proj", 0), ("up_proj", 1)]}


def make_linears(linear, quant_config, config, prefix):
    """The four linears of a layer, as vllm/model_executor/models/llama.py makes them."""
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    of = lambda name: {"quant_config": quant_config, "prefix": f"{prefix}.{name}"}
    attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    return {
        "self_attn.qkv_proj": linear.QKVParallelLinear(
            hidden, head_dim, heads, config["num_key_value_heads"], bias=attention, **of("self_attn.qkv_proj")
        ),
        "self_attn.o_proj": linear.RowParallelLinear(heads * head_dim, hidden, bias=attention, **of("self_attn.o_proj")),
        "mlp.gate_up_proj": linear.MergedColumnParallelLinear(hidden, [width] * 2, bias=mlp, **of("mlp.gate_up_proj")),
        "mlp.down_proj": linear.RowParallelLinear(width, hidden, bias=mlp, **of("mlp.down_proj")),
    }


def load(layer, name, tensors, prefix):
    """Hands every tensor of a linear to its parameter's loader; the names that were taken."""
    taken = set()
    parameters = dict(layer.named_parameters())
    parts = JOINED.get(name, [(name.rsplit(".", 1)[1], None)])
    for part, shard in parts:
        path = f"{prefix}.{name.rsplit('.', 1)[0]}.{part}."
        for key, tensor in tensors.items():
            if key.startswith(path):
                parameter = parameters[key.removeprefix(path)]
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
                taken.add(key)
    return taken


def same_values(layer, name, tensors, prefix):
    """The parameters hold what the file does: joined linears one part below the other. The shape of a joined weight is that of a part."""
    parts = [f"{prefix}.{name.rsplit('.', 1)[0]}.{part}." for part, _ in JOINED.get(name, [(name.rsplit(".", 1)[1], None)])]
    for key, parameter in layer.named_parameters():
        if key == "weight_shape" or "." in key:
            continue
        want = torch.cat([tensors[part + key] for part in parts])
        if parameter.shape != want.shape or not torch.equal(parameter.data, want.to(parameter.dtype)):
            return False
    return True


def check(folder, linear, classes):
    path = folder / "compressed"
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    dtype = torch.bfloat16 if folder.name.endswith("bf16") else torch.float32
    torch.set_default_dtype(dtype)
    quantized = config["quantization_config"]
    quant_config = classes.from_config(dict(quantized))
    quant_config.packed_modules_mapping = {k.rsplit(".", 1)[1]: [p for p, _ in v] for k, v in JOINED.items()}
    group = quantized["config_groups"]["group_0"]
    inputs = group.get("input_activations")
    try:
        linears = make_linears(linear, quant_config, config, "model.layers.0")
    except (NotImplementedError, ValueError) as e:
        # vLLM has no such kernel, and the README in the folder says so.
        refused = inputs is not None and not inputs["symmetric"]
        return report(f"{folder.name}: asymmetric activations are refused", refused, type(e).__name__)
    taken, same = set(), True
    for name, layer in linears.items():
        taken |= load(layer, name, tensors, "model.layers.0")
        same &= same_values(layer, name, tensors, "model.layers.0")
    theirs = {k for k in tensors if k.startswith("model.layers.0.") and "norm" not in k}
    schemes = sorted({type(getattr(layer, "scheme", None)).__name__ for layer in linears.values()})
    report(f"{folder.name}: every tensor of the linears has a parameter, of its values", taken == theirs and same, " ".join(schemes))
    expected = {None: "CompressedTensorsWNA16", 8: "CompressedTensorsWNA8Int", 4: "CompressedTensorsWNA4Int"}
    report(f"{folder.name}: the scheme is that of its activations", schemes == [expected[inputs and inputs["num_bits"]]])
    if "transform_config" in quantized:
        down = linears["mlp.down_proj"]
        method = down.quant_method
        size = next(iter(quantized["transform_config"]["config_groups"].values()))["head_dim"]
        x = torch.randn(5, config["intermediate_size"], dtype=torch.float32)
        ours = hadamard(x.unflatten(-1, (-1, size))).flatten(-2)
        got = method.input_transform(x)
        only_down = all(getattr(v.quant_method, "input_transform", None) is None for k, v in linears.items() if k != "mlp.down_proj")
        report(f"{folder.name}: R4 in blocks of {size}, before down_proj alone", only_down and torch.allclose(got, ours, atol=1e-6))


def main():
    vllm, folders = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2])
    if f"'{VERSION}'" not in (vllm / "vllm/_version.py").read_text():
        sys.exit(f"{vllm} is not vLLM {VERSION}")
    # What looks a version up finds that of the wheel.
    find = importlib.metadata.version
    importlib.metadata.version = lambda name: VERSION if name == "vllm" else find(name)
    sys.path.insert(0, str(vllm))
    sys.meta_path.append(StandIns(vllm))
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.transform import module  # noqa: F401

    print("imported; stand-ins for", ", ".join(sorted(replaced)))
    patch("get_tensor_model_parallel_world_size", lambda: 1)
    patch("get_tensor_model_parallel_rank", lambda: 0)
    patch("choose_mp_linear_kernel", lambda config: NoKernel)
    module.ops.hadacore_transform = lambda x, inplace: hadamard(x)
    for folder in sorted(folders.iterdir()):
        if (folder / "compressed").is_dir():
            check(folder, linear, CompressedTensorsConfig)
    print("all agree" if failures == 0 else f"{failures} do not agree")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
