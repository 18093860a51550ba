"""Greedy text of transformers in float32, for tests/models/generation.rs: python make_generation.py MODEL_DIR OUT.json

Needs torch and transformers. The prompts are continued by 256 tokens each, end tokens ignored.
"""

import json
import sys

import torch
import transformers

PROMPTS = [
    "The capital of France is",
    "In 1969 the first human beings set foot on the Moon. What followed",
]
TOKENS = 256


def main(folder, out):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Nothing ends the text early, and no token is suppressed.
    model.generation_config.eos_token_id = None
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )[0]
        # How far the second best token is: a difference of rounding decides only where this is tiny.
        with torch.no_grad():
            logits = model(made[None]).logits[0, ids.shape[1] - 1 : -1]
        best = logits.topk(2).values
        cases.append(
            {
                "prompt": prompt,
                "prompt_tokens": ids[0].tolist(),
                "tokens": made[ids.shape[1] :].tolist(),
                "closest": (best[:, 0] - best[:, 1]).min().item(),
            }
        )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    with open(out, "w") as f:
        json.dump({"model": "SmolLM2-135M-Instruct, Q4_1 weights widened to bf16", "versions": versions, "cases": cases}, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
