"""The examples that run without a hub."""

import math
import runpy
from pathlib import Path

import pytest

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import make_preferences

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_distillation():
    kls = runpy.run_path(str(EXAMPLES / "distillation.py"))["main"](steps=6)
    assert kls[-1] < kls[0]
    assert all(kl > 0 for kl in kls)


def test_a_trl_script_is_switched_by_one_import(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    make_model("llama").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    script = (EXAMPLES / "trl_tdpo.py").read_text()
    ours, theirs = "from tdpo.trl import TDPOTrainer as DPOTrainer  # before: ", "from trl import DPOTrainer\n"
    assert script.count(ours + theirs) == 1
    logs = {}
    for name, version in {"TDPO": script, "DPO": script.replace(ours, "")}.items():
        (tmp_path / f"{name}.py").write_text(version)
        args = trl.DPOConfig(
            output_dir=str(tmp_path / name),
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_cpu=USE_CPU,
            bf16=False,
            report_to="none",
            save_strategy="no",
        )
        main = runpy.run_path(str(tmp_path / f"{name}.py"))["main"]
        logs[name] = main(str(tmp_path), make_preferences(), args).state.log_history[:2]
    for tdpo, dpo in zip(logs["TDPO"], logs["DPO"]):
        assert set(dpo) - set(tdpo) == {"logits/chosen", "logits/rejected"}
        assert set(tdpo) - set(dpo) >= {"kl/chosen", "kl/rejected"}
    # At the start policy and reference agree: both losses are log 2. Then their gradients differ by the KL's.
    assert logs["TDPO"][0]["loss"] == pytest.approx(logs["DPO"][0]["loss"], rel=1e-5)
    assert logs["TDPO"][0]["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert logs["TDPO"][1]["kl/rejected"] > 0
