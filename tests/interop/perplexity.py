"""Compares perplexity and token ids of a model on a text with those of transformers.

    python tests/interop/perplexity.py MODEL TEXT [--windows N] [--seq-len N] [--bin FOLDER]

A folder of compressed-tensors runs in its own type there, in f32 here; perplexities may differ by half a percent. FOLDER holds the program `spinquant` and `examples/interop` (default: target/release).
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("text", type=pathlib.Path)
parser.add_argument("--windows", type=int, help="read at most this many windows")
parser.add_argument("--seq-len", type=int, default=2048)
parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("target/release"))
args = parser.parse_args()
failures = 0


def report(what, good, detail=""):
    global failures
    failures += not good
    print("ok  " if good else "FAIL", what, detail)


text = args.text.read_text(encoding="utf-8")


def encode(tokenizer):
    return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.uint32)


theirs = encode(PreTrainedTokenizerFast(tokenizer_file=str(args.model / "tokenizer.json")))
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "tokens"
    subprocess.run([args.bin / "examples/interop", "tokens", args.model, args.text, path], check=True)
    ours = np.fromfile(path, dtype="<u4")
same = len(ours) == len(theirs) and bool((ours == theirs).all())
detail = f"{len(ours)} of them"
if not same:
    shorter = min(len(ours), len(theirs))
    first = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    detail = f"ours {len(ours)}, theirs {len(theirs)}, first difference at {first}"
report("token ids agree", same, detail)

# A class that tokenizer_config.json names may split text otherwise than tokenizer.json does (GPT2Tokenizer of transformers 5: digits).
if (args.model / "tokenizer_config.json").exists():
    other = encode(AutoTokenizer.from_pretrained(args.model))
    differ = int((other != theirs).sum()) if len(other) == len(theirs) else f"{len(other)} instead of {len(theirs)}"
    print("note AutoTokenizer: token ids that are not those of tokenizer.json:", differ)

count = len(theirs) // args.seq_len
count = min(count, args.windows or count)
command = [args.bin / "spinquant", "eval", "--model", args.model, "--text", args.text, "--scheme", "W16A16KV16", "--dtype", "f32"]
packed = "quantization_config" in json.loads((args.model / "config.json").read_text())
if packed:  # says itself what it is
    command = command[: command.index("--scheme")] + command[command.index("--dtype") :]
command += ["--seq-len", str(args.seq_len), "--max-windows", str(count), "--json"]
got = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
report("both read the same windows", got["windows"] == count, f"{got['windows']} and {count} windows of {args.seq_len}")

model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto" if packed else torch.float32).eval()
windows = torch.from_numpy(theirs[: count * args.seq_len].astype(np.int64)).view(count, args.seq_len)
losses = []
with torch.no_grad():
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
want = math.exp(sum(losses) / len(losses))
error = abs(got["perplexity"] / want - 1)
report("perplexities agree", error <= (5e-3 if packed else 1e-4), f"{got['perplexity']:.6f} and {want:.6f}, relative difference {error:.1e}")

print("all agree" if failures == 0 else f"{failures} differ")
sys.exit(failures > 0)
