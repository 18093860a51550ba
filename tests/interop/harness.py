"""The same requests through `spinquant serve` and through lm-evaluation-harness' own backend for transformers: equal accuracies, and
log-likelihoods that differ by no more than 2e-3.

    python tests/interop/harness.py --binary target/release/spinquant --model DIR --tasks FOLDER [--limit 20] [--only piqa]

DIR is a Hugging Face folder with a tokenizer_config.json that names the BOS and the EOS. FOLDER holds arc_easy.jsonl, piqa.jsonl and winogrande.jsonl in the schema of `spinquant zeroshot`.
It needs lm_eval 0.4.13 with its `api` part, torch and transformers.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOUND = 2e-3
HERE = Path(__file__).resolve().parent / "harness"


@contextlib.contextmanager
def served(binary, model):
    """The URL of a server that scores with the model in full precision."""
    # Text requests of the harness are decoded tokens, which hold the BOS where there is one.
    command = [binary, "serve", "--model", model, "--device", "cpu", "--dtype", "f32", "--bos", "none", "--port", "0"]
    command += ["--scheme", "W16A16KV16", "--rotations", "none"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().strip() + "/v1/completions"
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
        if code != 0:
            sys.exit(f"the server ended with status {code}")


def tokenizer_with_bos(model, folder):
    """A copy of the model's tokenizer whose post-processor adds the BOS.

    `add_bos_token` makes the backend for transformers build such a tokenizer; the one for servers only asks for the special tokens that
    the tokenizer adds, and some add none.
    """
    config = json.loads((Path(model) / "tokenizer_config.json").read_text())
    tokenizer = json.loads((Path(model) / "tokenizer.json").read_text())
    bos = config["bos_token"]
    ids = [token["id"] for token in tokenizer["added_tokens"] if token["content"] == bos]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    sequence = [{"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1))]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, sequence[0]],
        "pair": [begin, *sequence],
        "special_tokens": {bos: {"id": bos, "ids": ids, "tokens": [bos]}},
    }
    os.symlink(Path(model) / "config.json", Path(folder) / "config.json")
    (Path(folder) / "tokenizer.json").write_text(json.dumps(tokenizer))
    # A class that takes the file as it is.
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def evaluate(tasks, limit, backend, **arguments):
    """Accuracies of every task, and (log-likelihood, greedy) of every candidate."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    batch = arguments.pop("batch_size")
    start = time.time()
    results = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=[f"schema_{task}" for task in tasks],
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        batch_size=batch,
        limit=limit,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    scores, answers = {}, {}
    for task in tasks:
        found = results["results"][f"schema_{task}"]
        for name in ("acc", "acc_norm"):
            if f"{name},none" in found:
                scores[task, name] = found[f"{name},none"]
        for sample in results["samples"][f"schema_{task}"]:
            for i, response in enumerate(sample["filtered_resps"]):
                answers[task, sample["doc_id"], i] = (float(response[0]), str(response[1]) == "True")
    return scores, answers, time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=["arc_easy", "piqa", "winogrande"])
    parser.add_argument("--bos", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    args = parser.parse_args()
    binary, model = os.path.abspath(args.binary), os.path.abspath(args.model)
    os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    os.chdir(args.tasks)

    print("| BOS | requests | batch | answers | accuracies | greedy | largest difference of a log-likelihood | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    wrong = []
    with served(binary, model) as url, tempfile.TemporaryDirectory() as folder:
        for bos in (choice == "yes" for choice in args.bos):
            tokenizer = tokenizer_with_bos(model, folder) if bos else model
            want, known, seconds = evaluate(
                args.only, args.limit, "hf", pretrained=model, dtype="float32", add_bos_token=bos, batch_size=16
            )
            shown = ", ".join(f"{task} {name} {value:.4f}" for (task, name), value in want.items())
            print(f"| {'yes' if bos else 'no'} | transformers | 16 | {len(known)} | {shown} | | | {seconds:.0f} |", flush=True)
            for tokenized in (True, False):
                for batch in (1, 16):
                    got, answers, seconds = evaluate(
                        args.only, args.limit, "local-completions", model=model, base_url=url, tokenizer=tokenizer,
                        tokenizer_backend="huggingface", tokenized_requests=tokenized, max_length=2048,
                        add_bos_token=bos, num_concurrent=4 if batch == 1 else 1, batch_size=batch,
                    )  # fmt: skip
                    if answers.keys() != known.keys():
                        sys.exit("other requests were answered than asked")
                    worst = max(abs(answers[key][0] - known[key][0]) for key in known)
                    greedy = sum(answers[key][1] == known[key][1] for key in known)
                    equal = got == want
                    kind = "tokens" if tokenized else "text"
                    line = f"| {'yes' if bos else 'no'} | {kind} | {batch} | {len(answers)} "
                    line += f"| {'equal' if equal else got} | {greedy} equal | {worst:.1e} | {seconds:.0f} |"
                    print(line, flush=True)
                    if not (equal and worst <= BOUND and greedy == len(known)):
                        wrong.append(line)
    if wrong:
        sys.exit("not as transformers:\n" + "\n".join(wrong))
    print("all as transformers", file=sys.stderr)


if __name__ == "__main__":
    main()
