"""What the trainer's options gain, on a small Llama (6 layers of width 512, vocabulary 4,000) and ragged data.

    python benchmarks/bench_trainer.py [--rounds 5]

* speed: forward and backward of a batch of 8 pairs with responses of 8 to 256 tokens: padded, packed, and packed with
  the reference cached, alternating; seconds, and the number of positions that the models process.
* storage: relative errors of the KL and of the loss gradient when the reference's hidden states are stored in less than
  float32, for a policy whose weights differ from the reference's by a relative perturbation.
* peak: resident memory of a process that trains one step with a live reference, and with a cached one (8 layers of
  width 768; the reference is a second model).

Results go to benchmarks/results/bench_trainer.json.
"""

from __future__ import annotations

import argparse
import functools
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import medians, save
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 4}
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCAB = 4000
PAIRS = 8
STORED = ("float16", "bfloat16", "float8")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word `w1`, `w2`, ..., so that the number of words is the number of tokens."""
    vocabulary = {"<end>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def preferences(rows: int) -> Dataset:
    draw = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        length = round(shortest * (longest / shortest) ** draw.random())
        return " ".join(f"w{draw.randrange(1, VOCAB)}" for _ in range(length))

    return Dataset.from_list(
        [{"prompt": text(8, 64), "chosen": text(8, 256), "rejected": text(8, 256)} for _ in range(rows)]
    )


def model(perturbation: float = 0.0, sizes: dict = SIZES) -> LlamaForCausalLM:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    if perturbation:
        for parameter in llama.parameters():
            parameter.data += perturbation * parameter.data.std() * torch.randn_like(parameter)
    return llama


def trainer(out: Path, perturbation: float = 1e-2, sizes: dict = SIZES, **options):
    from tdpo import TDPOConfig, TDPOTrainer

    settings = {"per_device_train_batch_size": PAIRS, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    args = TDPOConfig(output_dir=str(out), **{**settings, "disable_tqdm": True, "max_steps": 1, **options})
    return TDPOTrainer(
        model(perturbation, sizes),
        model(0.0, sizes),
        args,
        train_dataset=preferences(4 * PAIRS),
        processing_class=tokenizer(),
    )


def speed(out: Path, rounds: int) -> dict:
    candidates, positions = {}, {}
    for name, options in {
        "padded, live reference": {},
        "packed, live reference": {"padding_free": True},
        "packed, cached reference": {"padding_free": True, "precompute_reference": True},
    }.items():
        tdpo_trainer = trainer(out / name.replace(", ", "-").replace(" ", "-"), **options)
        batch = next(iter(tdpo_trainer.get_train_dataloader()))
        positions[name] = batch["input_ids"].numel()
        candidates[name] = functools.partial(step, tdpo_trainer.model, batch)
    return {"seconds": medians(candidates, rounds), "positions": positions}


def step(policy, batch: dict) -> None:
    policy(preference=batch).loss.backward()


def storage(out: Path) -> list[dict]:
    return [storage_errors(out, perturbation) for perturbation in (1e-3, 1e-2, 1e-1)]


def storage_errors(out: Path, perturbation: float) -> dict:
    """Errors of 16-bit and float8 caches against a float32 one."""
    kls, gradients = {}, {}
    for dtype in ("float32", *STORED):
        cache = {"precompute_reference": True, "reference_dtype": dtype}
        tdpo_trainer = trainer(out / f"{perturbation}-{dtype}", perturbation, **cache)
        output = tdpo_trainer.model(preference=next(iter(tdpo_trainer.get_train_dataloader())))
        output.loss.backward()
        kls[dtype] = torch.cat([output.chosen.kl, output.rejected.kl])
        gradients[dtype] = torch.cat([p.grad.flatten() for p in tdpo_trainer.model.parameters()])

    def errors(values: dict) -> dict:
        exact = values["float32"]
        return {dtype: ((values[dtype] - exact).norm() / exact.norm()).item() for dtype in STORED}

    return {
        "perturbation": perturbation,
        "kl_per_sequence": kls["float32"].mean().item(),
        "kl_error": errors(kls),
        "gradient_error": errors(gradients),
    }


def peak(kind: str, out: str) -> None:
    cache = {"precompute_reference": True, "reference_cache": f"{out}/cache"} if kind == "cached" else {}
    trainer(Path(out, kind), sizes=LARGE, optim="sgd", **cache).train()
    status = Path("/proc/self/status").read_text()  # getrusage would include the parent's peak
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def peaks(out: Path) -> dict[str, float]:
    peak_mb = {}
    for kind in ("live", "cached", "cached"):  # the first cached run writes the cache, the second reads it
        command = [sys.executable, __file__, "--peak", kind, str(out)]
        peak_mb[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return peak_mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return peak(*arguments.peak)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        parameters = sum(p.numel() for p in model(sizes=LARGE).parameters())
        results = {
            "large_model_mb": 4 * parameters / 2**20,
            "speed": speed(out, arguments.rounds),
            "storage": storage(out),
            "peak_mb": peaks(out),
        }
    for name, value in results.items():
        print(f"{name}: {value}")
    print(f"saved {save('bench_trainer', results)}")


if __name__ == "__main__":
    main()
