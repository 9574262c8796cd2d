"""Changes of the trainer that its tests must notice; `python tools/mutations.py` applies them one at a time."""

CACHE, CHECKPOINTS, CLI = "trainer/test_reference_cache.py", "trainer/test_checkpoints.py", "trainer/test_cli.py"
DEMO = "trainer/test_demo.py::test_a_whole_bfloat16_model_is_trained_in_float32"
CONFIG, DATA, EVALUATION = "trainer/test_config.py", "trainer/test_data.py", "trainer/test_evaluation.py"
FEATURES, METRICS, TRL = "trainer/test_trainer_features.py", "trainer/test_metrics.py", "trainer/test_trl.py"
GGUF, NAMED, TOKENS = "trainer/test_gguf.py", "trainer/test_objectives_by_name.py", "trainer/test_token_data.py"
MESSAGES, TRAINER = "trainer/test_messages.py", "trainer/test_trainer.py"
PRECISION = "trainer/test_precision.py"
FAST_CACHE = [f"{CACHE}::test_{name}" for name in (
    "flipped_bits_are_detected_or_harmless",
    "damaged_files_are_named",
    "the_fingerprint_covers_both_responses_and_the_prompt",
    "rows_without_a_prompt_and_dropped_rows",
    "a_full_disk_is_a_clear_error_and_the_cache_resumes",
    "space_is_reserved",
    "an_interrupted_cache_resumes",
)]  # fmt: skip


def _of(file, *mutations):
    return [
        {"file": f"python/tdpo/{file}", "find": find, "replace": replace, "tests": tests}
        for find, replace, tests in mutations
    ]


MUTATIONS = [
    *_of(
        "config.py",
        ("OBJECTIVES[self.variant]", 'OBJECTIVES["tdpo2"]', [CONFIG]),
        (
            "ObjectiveOptions(self.beta, self.alpha, self.label_smoothing, self.simpo_gamma)",
            "ObjectiveOptions(self.beta)",
            [CONFIG],
        ),
        ("self.kl_direction or named.kl_direction", 'self.kl_direction or "forward"', [TOKENS]),
        ('own, self.kl_direction or "forward"', 'own, "forward"', [TOKENS]),
        ("checks.integer(name, getattr(self, name), least=1)", "checks.integer(name, getattr(self, name))", [CONFIG]),
        ("if self.max_prompt_length >= self.max_length", "if self.max_prompt_length > self.max_length", [CONFIG]),
        ('"max_length": 2, "max_prompt_length": 1,', '"max_length": 2, "max_prompt_length": 0,', [CONFIG]),
        ("if not isinstance(getattr(self, name), bool):", "if getattr(self, name) is None:", [CONFIG]),
    ),
    *_of(
        "data.py",
        ("return saved[split]", 'return saved["train"]', [DATA]),
        (
            '            return self.tokenizer(text, add_special_tokens=False)["input_ids"]',
            '            return self.tokenizer(text, add_special_tokens=True)["input_ids"]',
            [DATA],
        ),
        ("return ids[:-1] if ends else ids", "return ids", [DATA]),
        (
            "return tokenizer.eos_token_id if tokenizer.pad_token_id is None",
            "return tokenizer.eos_token_id if True",
            [DATA],
        ),
        ("return ids if ids[-1:] == [end]", "return ids if end in ids[-3:]", [DATA]),
        ("return ids if ids[-1:] == [end]", "return ids if False", [DATA]),
        ("if templated and text.rstrip().endswith", "if text.rstrip().endswith", [DATA]),
        ("if templated and text.rstrip().endswith", "if templated and text.endswith", [DATA]),
        ("return ids[:length] if last_end < length else", "return", [DATA]),
        ("except (ValueError, TemplateError) as error:", "except ValueError as error:", [DATA]),
        ("ids.prompt[-self.max_prompt_length :]", "ids.prompt[: self.max_prompt_length]", [DATA]),
        ("{name: values[:available] for name, values in ids.columns.items()}", "ids.columns", [TOKENS]),
        ("check_ids(name, row[name], len(self.tokenizer))", "pass", [TOKENS]),
        (
            "dataset.select_columns(list(TOKEN_IDS))",
            "dataset.select_columns(list(TOKEN_IDS[:2]))",
            FAST_CACHE,
        ),
        (
            "for numbers in (tokens.value_lengths(), tokens.flatten()):",
            "for numbers in (tokens.flatten(),):",
            [MESSAGES],
        ),
        ("num_proc=None if num_proc is None else min(num_proc, len(dataset)),", "", [MESSAGES]),
        ("if len(response) <= available:", "if len(response) < available:", [DATA]),
        (
            'if responses["chosen"] == responses["rejected"]:\n            return _NO_TOKENS, "equal responses"\n',
            "",
            [DATA],
        ),
        (
            'if responses["chosen"] == responses["rejected"]:\n            return _NO_TOKENS, f"responses that',
            'if False:\n            return _NO_TOKENS, f"responses that',
            [MESSAGES],
        ),
    ),
    *_of(
        "messages.py",
        ("if shared < min(len(chosen), len(rejected)):", "if True:", [DATA]),
        ('if messages and messages[-1]["role"] == "assistant":', "if False:", [DATA]),
        ("if role is None:", "if False:", [DATA]),
        ("if all(part is None for", "if any(part is None for", [DATA]),
        ("max(shared, 0)", "max(shared, 1)", [DATA]),
        ("return 0 if turn < 0 else turn", "return turn", [DATA]),
        ('if chosen[0]["role"] not in _BEFORE_ANSWERS:', "if True:", [MESSAGES]),
        ("if prompt.strip() not in", "if False and prompt.strip() not in", [MESSAGES]),
        ("if prompt and all(_same", "if False and all(_same", [MESSAGES]),
        ("if media:", "if False:", [MESSAGES]),
        ("if None not in (chosen, rejected) and", "if", [MESSAGES]),
        (', **(row.get("chat_template_kwargs") or {})}', "}", [MESSAGES]),
        ('if messages and messages[0]["role"] == "system":', "if False:", [MESSAGES]),
    ),
    *_of(
        "collator.py",
        ("column[sequence.first - sequence.prompt :]", "column", [TOKENS]),
        ('reference_cache.hidden(row["position"], side)', 'reference_cache.hidden(row["index"], side)', FAST_CACHE),
        ("predicted[starts] = False", "predicted[0] = False", [DATA, TRL]),
    ),
    *_of(
        "files.py",
        ("if error.errno in _NO_FALLOCATE:", "if False:", FAST_CACHE),
        (
            "if not _fallocate(file.fileno(), size):",
            "if True:\n                file.truncate(size)\n            else:",
            FAST_CACHE,
        ),
        ("        path.unlink(missing_ok=True)\n", "", FAST_CACHE),
        ("content.pop(_SEAL, None) != _seal(content)", "content.pop(_SEAL, None) is None", FAST_CACHE),
    ),
    *_of(
        "reference_cache.py",
        ('if digest(checksums) != header["checksums"]:', "if False:", FAST_CACHE),
        ("if path.stat().st_size != size:", "if path.stat().st_size > size:", FAST_CACHE),
        (
            "lengths.append(torch.stack([chosen, rejected], dim=1)",
            "lengths.append(torch.stack([chosen, rejected], dim=0)",
            FAST_CACHE,
        ),
        ("!= self._checksums[row]:", "!= self._checksums[row] and False:", FAST_CACHE),
        (
            'total, saved = self.header["rows"], self.header["done"]',
            'total, saved = self.header["rows"], 0',
            FAST_CACHE,
        ),
        ('if header["done"] != header["rows"]:', "if False:", FAST_CACHE),
    ),
    *_of(
        "checkpoints.py",
        ("or file_digest(path) != digest:", "or False:", [CHECKPOINTS]),
        (
            '        if not path.is_file():\n            raise ValueError(f"{path} is missing")',
            "        if not path.is_file():\n            continue",
            [CHECKPOINTS],
        ),
        (
            "        else:\n            return str(checkpoint), problems",
            "        return str(checkpoint), problems",
            [CHECKPOINTS],
        ),
        ("found[path], reverse=True)", "str(path), reverse=True)", [CHECKPOINTS]),
        ("if unknown:", "if False:", [CHECKPOINTS]),
        ('["only_model"]:', '["only_model"] and False:', [CHECKPOINTS]),
        (
            "            shutil.rmtree(destination)\n",
            "            pass\n",
            [CHECKPOINTS],
        ),
        ("not torch.isfinite(values).all()", "torch.isnan(values).any()", [CHECKPOINTS]),
        ("shutil.rmtree(staging, ignore_errors=True)\n        raise", "raise", [CHECKPOINTS]),
    ),
    *_of(
        "reference.py",
        ("with without_adapters, args", "with args", [FEATURES]),
        ("logits_budget=args.logits_budget,", "", [FEATURES]),
        ("if policy.vocab_size != reference.vocab_size:", "if False:", [TRAINER]),
    ),
    *_of("engines.py", ("model = model.eval().requires_grad_(False)", "pass", [TRAINER])),
    *_of(
        "trainer.py",
        ("else copy.copy(args)", "else args", [PRECISION]),
        ("with autocast(args):", "if True:", [PRECISION]),
        ("for callback in (self._stop, WarnOfCoarseWeights()):", "for callback in (self._stop,):", [PRECISION]),
        ("preference_metrics(output, self.args.beta)", "preference_metrics(output, 0.1)", [EVALUATION]),
        ("with torch.no_grad(), self.compute_loss", "with self.compute_loss", [EVALUATION]),
        ('        if "loss" in logs:\n', "        if True:\n", [EVALUATION]),
        ("PairMetric(losses, torch.ones_like(losses))", "PairMetric(losses, losses)", [EVALUATION]),
        ("        checkpoints.check_finite(self)\n", "", [CHECKPOINTS]),
        ("        checkpoints.check(self.state.best_model_checkpoint)\n", "", [CHECKPOINTS]),
        ("self._checkpoint_to_resume(resume_from_checkpoint)", "resume_from_checkpoint", [CHECKPOINTS]),
    ),
    *_of(
        "precision.py",
        ("return nullcontext() if dtype is None else", "return nullcontext() if True else", [PRECISION]),
        ("_autocast_dtype(args) is None:", "False:", [PRECISION]),
        ("limits.eps * 2.0 **", "limits.eps * size + 0.0 *", [PRECISION]),
        ("sizes = sizes[sizes > 0]", "sizes = sizes[sizes >= 0]", [PRECISION]),
        ("if dtype in by_dtype:", "if False:", [PRECISION]),
        ("flatten()[::every]", "flatten()[:_SAMPLED_WEIGHTS]", [PRECISION]),
    ),
    *_of(
        "options.py",
        ('if self.dtype != "auto" or frozen else "float32"', "", [PRECISION]),
        ("self.lora_r > 0 or self.load_in_4bit", "self.lora_r > 0", [PRECISION]),
        (
            'return self._load("ref_model", "ref_gguf_file")',
            'self.dtype = "bfloat16"\n            return self._load("ref_model", "ref_gguf_file")',
            [PRECISION],
        ),
    ),
    *_of("causal_lm.py", ("tolerance = 0.02 if rounded else 1e-3", "tolerance = 1e-3", [PRECISION])),
    *_of("commands.py", ("with autocast(args):", "if True:", [PRECISION])),
    *_of("samples.py", ("with context(), autocast(args):", "with context():", [PRECISION])),
    *_of("run_record.py", ('    options["dtype"] = trainer.trained_dtypes\n', "", [PRECISION])),
    *_of(
        "trl.py",
        ("        self.add_callback(WarnOfCoarseWeights())\n", "", [PRECISION]),
        ("with autocast(self.args):", "if True:", [PRECISION]),
    ),
    *_of("demo/experiment.py", ('"auto" if self.settings.lora_r else "float32"', '"auto"', [DEMO])),
    *_of(
        "loss.py",
        (
            "weight=policy.weight.to(dtype)",
            "weight=self.__dict__.setdefault('w', policy.weight.to(dtype))",
            [PRECISION],
        ),
        ("if self.fallback_reason is None and policy.softcap != reference.softcap:", "if False:", [FEATURES]),
        ("logits_budget=self.logits_budget,", "", [FEATURES]),
        ('"sum", lengths=lengths, initial=0)', '"mean", lengths=lengths, initial=0)', [TRAINER]),
        ("with self.without_adapters():", "with contextlib.nullcontext():", [FEATURES]),
    ),
    *_of(
        "metrics.py",
        (
            "chosen.entropy + rejected.entropy, chosen.tokens + rejected.tokens)",
            "chosen.entropy, chosen.tokens)",
            [METRICS],
        ),
        (
            "PairMetric(chosen.correct, chosen.tokens)",
            "PairMetric(chosen.correct + rejected.correct, chosen.tokens + rejected.tokens)",
            [METRICS],
        ),
        (
            "PairMetric(chosen.correct, chosen.tokens)",
            "PairMetric(chosen.correct / chosen.tokens, torch.ones_like(chosen.tokens))",
            [METRICS],
        ),
        ("(chosen > rejected)", "(chosen >= rejected)", [METRICS]),
        ("sums, self._sums = self._sums, {}", "sums = self._sums", [METRICS]),
        ("self._sums.get(name, 0) + entries.sum(0)", "self._sums.get(name, 0) + entries.mean(0)", [METRICS]),
        ("first = {row: position for", "first = {position: position for", [METRICS]),
        ("torch.stack([values, weights], 1).double()", "torch.stack([values, weights], 1).float()", [METRICS]),
        ("self._rows, self._tables = [], defaultdict(list)\n        first", "first", [METRICS]),
    ),
    *_of(
        "commands.py",
        ("resume_from_checkpoint=args.resume_from_checkpoint or interrupted", "", [CLI]),
        (
            'evaluation = load_preferences(require(data, "eval_dataset"), data.eval_split)',
            'evaluation = load_preferences(require(data, "eval_dataset"), data.split)',
            [CLI],
        ),
        ("models.reference() or models.policy()", "models.policy()", [CLI]),
        ("args.max_prompt_length, args.overlong", "args.max_prompt_length", [CLI]),
    ),
    *_of(
        "options.py",
        ("            lora_alpha=self.lora_alpha,\n", "", [CLI]),
        (
            "    if value is None:\n        return []\n    if isinstance(value, list)",
            "    if isinstance(value, list)",
            [CLI],
        ),
        ("except yaml.YAMLError as error:", "except ZeroDivisionError as error:", [CLI]),
        ("        check(name)\n", "        pass\n", [CLI]),
        ("_unreadable_file(name) or Path(", "Path(", [CLI]),
        ('self._load("ref_model", "ref_gguf_file")', 'self._load("ref_model", "gguf_file")', [GGUF]),
    ),
    *_of(
        "gguf.py",
        ("GgufConfig(dequantize=True)", "None", [GGUF]),
        ("    model.gguf_file = gguf_file  #", "    #", [GGUF]),
    ),
    *_of(
        "cli.py",
        ("        return 1\n", "        return 2\n", [CLI]),
        ("        return 130\n", "        return 1\n", [CLI]),
    ),
    *_of(
        "samples.py",
        ("            with context():\n", "            with contextlib.nullcontext():\n", [EVALUATION]),
        ("generated[0, tokens.shape[1] :]", "generated[0]", [EVALUATION]),
    ),
    *_of(
        "model_card.py",
        ('if name == "alpha" and "alpha" not in OBJECTIVES[args.variant].options:', "if True:", [FEATURES]),
    ),
    *_of(
        "trl_losses.py",
        ("check_label_smoothing(args.label_smoothing)", "pass", [TRL]),
        ("list(zip(weights, objectives))", "list(zip([1.0] * 9, objectives))", [TRL]),
    ),
    *_of(
        "objectives.py",
        ("if option.name not in OBJECTIVES[name].options", "if False", [CONFIG]),
        ("len({id(loss.margin) for loss in losses}) == 1", "True", [NAMED]),
    ),
    *_of(
        "trl.py",
        ('    "ld_alpha": (None,),\n', "", [TRL]),
        ("trl_objective(self.args, alpha=alpha,", "trl_objective(self.args, alpha=0.5,", [TRL]),
        ('batch["completion_mask"].bool()', 'batch["attention_mask"].bool()', [TRL]),
    ),
]
