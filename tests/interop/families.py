"""Tiny random models of every family and every rotary scaling, made by transformers' own classes.

    python tests/interop/families.py                 writes tests/fixtures/families
    python tests/interop/families.py --check DIR     compares what `cargo run --example interop -- families DIR` wrote
    python tests/interop/families.py --packed DIR    the same for its packed weights, with compressed-tensors

A model is `FAMILY/model.safetensors` (values that bf16 holds); each of its configurations is `FAMILY/VARIANT.json`, as transformers saves
it, and `FAMILY/VARIANT.safetensors` has token ids `[sequences, tokens]` and their logits in f32. Weights are so large that the logits have
a standard deviation of at least 1, and that leaving out any one feature moves them by at least 100 times the tolerance of 1e-4.
"""

import copy
import json
import math
import pathlib
import re
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "families"
TOLERANCE = 1e-4
VOCAB, TOKENS, SHORT = 64, 24, 12

LISTS = {"short_factor": [1.1, 1.3, 1.6, 2.0], "long_factor": [1.5, 2.5, 4.0, 7.0]}


def divisors(count):
    return {name: [values[i % 4] + i / 8 for i in range(count)] for name, values in LISTS.items()}


# Sizes that all share, unless a family says otherwise.
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
STRETCHED = dict(max_position_embeddings=64, original_max_position_embeddings=16)
ROPE = dict(rope_theta=100.0)
WINDOW = dict(use_sliding_window=True, sliding_window=5)

# Model type, what differs in sizes, and what each variant changes of the first.
FAMILIES = {
    "llama": (
        dict(attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="default", **ROPE)),
        {
            "plain": {},
            "linear": dict(rope_parameters=dict(rope_type="linear", factor=3.0, **ROPE)),
            "dynamic": dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", factor=3.0, **ROPE)),
            "llama3": dict(
                rope_parameters=dict(
                    rope_type="llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=32,
                    **ROPE,
                )
            ),
            "yarn": dict(
                rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, **ROPE)
            ),
            "yarn-mscale": dict(
                rope_parameters=dict(
                    rope_type="yarn",
                    factor=4.0,
                    original_max_position_embeddings=16,
                    beta_fast=3.0,
                    beta_slow=0.5,
                    mscale=1.5,
                    mscale_all_dim=0.5,
                    truncate=False,
                    **ROPE,
                )
            ),
            "longrope": dict(
                rope_parameters=dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=16, **divisors(4), **ROPE)
            ),
        },
    ),
    "mistral": (
        dict(head_dim=16, sliding_window=None, rope_parameters=dict(rope_type="default", **ROPE)),
        {"plain": {}, "window": dict(sliding_window=5)},
    ),
    "qwen2": (
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", **ROPE)),
        {"plain": {}, "window": dict(max_window_layers=1, **WINDOW)},
    ),
    "qwen3": (
        dict(head_dim=16, rope_parameters=dict(rope_type="default", **ROPE)),
        {"plain": {}, "window": dict(layer_types=["sliding_attention", "full_attention"], **WINDOW)},
    ),
    "phi3": (
        dict(num_attention_heads=2, num_key_value_heads=1, rope_parameters=dict(rope_type="default", **ROPE)),
        {
            "plain": {},
            "window": dict(sliding_window=5),
            "partial": dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.75, **ROPE)),
            "longrope": dict(
                rope_parameters=dict(rope_type="longrope", partial_rotary_factor=0.75, **divisors(6), **ROPE), **STRETCHED
            ),
        },
    ),
    "smollm3": (
        dict(num_hidden_layers=3, no_rope_layer_interval=2, rope_parameters=dict(rope_type="default", **ROPE)),
        {"plain": {}, "window": WINDOW},
    ),
    "granite": (
        dict(
            tie_word_embeddings=True,
            attention_bias=True,
            embedding_multiplier=2.5,
            residual_multiplier=0.6,
            attention_multiplier=0.5,
            logits_scaling=0.75,
            rope_parameters=dict(rope_type="default", **ROPE),
        ),
        {"plain": {}},
    ),
}

# Features: by the fields of the configuration that make it, and what they are without.
WITHOUT = {
    "sliding_window": (lambda c: c.get("use_sliding_window", True) and c.get("sliding_window"), dict(sliding_window=None)),
    "no_rope_layers": (lambda c: c["model_type"] == "smollm3", dict(no_rope_layers=[1, 1, 1], layer_types=None)),
    "embedding_multiplier": (lambda c: "embedding_multiplier" in c, dict(embedding_multiplier=1.0)),
    "residual_multiplier": (lambda c: "residual_multiplier" in c, dict(residual_multiplier=1.0)),
    "attention_multiplier": (lambda c: "attention_multiplier" in c, dict(attention_multiplier=8**-0.5)),
    "logits_scaling": (lambda c: "logits_scaling" in c, dict(logits_scaling=1.0)),
    "rotary scaling": (
        lambda c: c["rope_parameters"]["rope_type"] != "default",
        dict(rope_parameters=dict(rope_type="default", **ROPE)),
    ),
    "attention factor": (
        lambda c: c["rope_parameters"]["rope_type"] in ["yarn", "longrope"],
        dict(rope_parameters=lambda rope: {**rope, "attention_factor": 1.0}),
    ),
    "the part of a head": (
        lambda c: c["rope_parameters"].get("partial_rotary_factor", 1.0) != 1.0 and c["rope_parameters"]["rope_type"] == "default",
        dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1.0, **ROPE)),
    ),
}


def config(kind, variant):
    own, variants = FAMILIES[kind]
    fields = copy.deepcopy({**SIZES, **own, **variants[variant]})
    return AutoConfig.for_model(kind, **fields)


def build(config, weights=None):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    if weights is not None:
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
        model.tie_weights()
    return model


def randomise(model, seed):
    """Weights of a trained model's kind, but larger: values that bf16 holds."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda p: torch.randn(p.shape, generator=g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                value = 1 + 0.3 * normal(p)
            elif name.endswith("bias"):
                value = 0.7 * normal(p)
            elif "embed_tokens" in name:
                value = 0.5 * normal(p)
            else:
                # Attention looks at few tokens: what changes scores changes logits.
                strong = 2.0 if any(part in name for part in ["q_proj", "k_proj", "qkv_proj"]) else 1.2
                value = strong * normal(p) / math.sqrt(p.shape[1])
            p.copy_(value.bfloat16().float())
    return {k: v.clone() for k, v in model.state_dict().items()}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def check_features(kind, variant, weights, ids, wanted):
    fields = config(kind, variant).to_dict()
    smallest = (float("inf"), None)

    def moved(name, other):
        nonlocal smallest
        by = (other - wanted).abs().max().item()
        assert by >= 100 * TOLERANCE, f"{kind} {variant}: without {name} the logits move by {by:.1e}"
        smallest = min(smallest, (by, name))

    for name, (has, change) in WITHOUT.items():
        if has(fields):
            other = config(kind, variant)
            for field, value in change.items():
                setattr(other, field, value(copy.deepcopy(other.rope_parameters)) if callable(value) else copy.deepcopy(value))
            if name in ["sliding_window", "no_rope_layers"] and hasattr(other, "layer_types"):
                other.layer_types = ["full_attention"] * other.num_hidden_layers
            moved(name, logits(build(other, weights), ids))
    # Biases and gains, a kind at a time, in all layers.
    in_all = lambda name: re.sub(r"\.\d+\.", ".*.", name)
    for part in sorted({in_all(n) for n in weights if n.endswith("bias") or "norm" in n}):
        neutral = lambda t: torch.zeros_like(t) if part.endswith("bias") else torch.ones_like(t)
        without = {n: neutral(t) if in_all(n) == part else t for n, t in weights.items()}
        moved(part, logits(build(config(kind, variant), without), ids))
    return smallest


def write():
    total = 0
    for seed, kind in enumerate(FAMILIES):
        folder = FIXTURES / kind
        folder.mkdir(parents=True, exist_ok=True)
        weights = None
        for variant in FAMILIES[kind][1]:
            if weights is None:
                weights = randomise(build(config(kind, variant)), seed)
                stored = {n: t.bfloat16() for n, t in weights.items()}
                if config(kind, variant).tie_word_embeddings:
                    del stored["lm_head.weight"]
                save_file(stored, folder / "model.safetensors", {"format": "pt"})
            g = torch.Generator().manual_seed(100 + seed)
            ids = torch.randint(VOCAB, (2, TOKENS), generator=g)
            model = build(config(kind, variant), weights)
            wanted = logits(model, ids)
            least, name = check_features(kind, variant, weights, ids, wanted)
            assert wanted.std() >= 1, wanted.std()
            outcome = dict(ids=ids.to(torch.uint32), logits=wanted)
            if "longrope" in variant:
                # Within the original context other divisors hold.
                outcome |= {"short.ids": ids[:, :SHORT].to(torch.uint32).contiguous(), "short.logits": logits(model, ids[:, :SHORT])}
                by = (outcome["short.logits"] - wanted[:, :SHORT]).abs().max().item()
                assert by >= 100 * TOLERANCE, by
            save_file(outcome, folder / f"{variant}.safetensors")
            saved = model.config.to_json_string(use_diff=True)
            (folder / f"{variant}.json").write_text(json.dumps(json.loads(saved), indent=1) + "\n")
            print(f"{kind:8} {variant:12} std {wanted.std():.2f}, max {wanted.abs().max():.1f}; least without {name}: {least:.2e}")
        size = sum(f.stat().st_size for f in folder.iterdir())
        total += size
        print(f"{kind}: {size / 1000:.0f} kB")
    print(f"{total / 1000:.0f} kB in all")


def check(outputs):
    failures = 0
    for kind in FAMILIES:
        for variant in FAMILIES[kind][1]:
            expected = load_file(FIXTURES / kind / f"{variant}.safetensors")
            # With the source's configuration, changed as needed, and with one of our own.
            for own in ["", "-own"]:
                folder = outputs / f"{kind}-{variant}{own}"
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
                assert model.config.model_type == kind
                for part in ["", "short."] if "short.ids" in expected else [""]:
                    got = logits(model, expected[part + "ids"].long())
                    error = (got - expected[part + "logits"]).abs().max().item()
                    failures += not error < TOLERANCE
                    print("ok  " if error < TOLERANCE else "FAIL", f"{kind} {variant}{own} {part}: max|difference| {error:.1e}")
    sys.exit(failures > 0)


def check_packed(outputs):
    failures = 0
    for kind in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(outputs / f"{kind}-packed", dtype=torch.float32).eval()
        linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        packed = [n for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None]
        ours = load_file(outputs / f"{kind}-packed.safetensors")
        error = (logits(model, ours["tokens"].long())[0] - ours["logits"]).abs().max().item()
        good = error < TOLERANCE and linears == packed
        failures += not good
        print("ok  " if good else "FAIL", f"{kind} packed: {len(packed)} of {len(linears)} linears, max|difference| {error:.1e}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--packed"]:
        check_packed(pathlib.Path(sys.argv[2]))
    if sys.argv[1:2] == ["--check"]:
        check(pathlib.Path(sys.argv[2]))
    write()
