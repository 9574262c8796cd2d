"""Changes of the library that its tests must notice; `python tools/mutations.py` applies them one at a time."""

BUILD = "library/test_build.py"
BAD, DEFERRED, DIVERGENCE = (f"library/test_{name}.py" for name in ("bad_arguments", "deferred", "divergence"))
INPUTS, LINEAR, LOSSES = (f"library/test_{name}.py" for name in ("linear_inputs", "linear", "losses"))
OBJECTIVES, OPS, PEAKED = (f"library/test_{name}.py" for name in ("objectives", "ops", "peaked_rows"))
PER_TOKEN, PLAN, WAITS = (f"library/test_{name}.py" for name in ("per_token", "plan", "no_waits"))
REFERENCES, REVERSE = "library/test_references.py", "library/test_reverse_kl.py"
FAULTS, SHARDED = "library/test_shard_faults.py", "library/test_vocab_parallel.py"


def _of(file, *mutations):
    return [{"file": file, "find": find, "replace": replace, "tests": tests} for find, replace, tests in mutations]


MUTATIONS = [
    *_of(
        "tdpo_ext/fused/plan.py",
        ("even = cut(min(most, max(", "even = cut(max(most, max(", [PLAN]),
        ("max(total_memory // 12, 256 << 20)", "max(total_memory // 24, 256 << 20)", [PLAN]),
        ("block = max(1, min(rows, STREAMING_ROWS))", "block = max(1, rows)", [PLAN]),
        ("columns = columns // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE", "pass", [PLAN]),
        ("if not deferred or least > streaming_seconds:", "if not deferred:", [PLAN]),
        ("    if not can_defer:\n", "    if True:\n", [DEFERRED]),
        ("kept = (sizes.accumulated_weight - sizes.weight_sum) // sizes.dz_row", "pass", [PLAN]),
        ("if kept and kept[-1] + rows <= most:", "if kept:", [PLAN, DEFERRED]),
    ),
    *_of(
        "tdpo_ext/fused/sizes.py",
        ("return 2 * self.logit_bytes + (", "return self.logit_bytes + (", [PLAN]),
        (
            "return self.weight_bytes * (2 * self.width + self.ref_width)",
            "return self.weight_bytes * (2 * self.width)",
            [PLAN],
        ),
        ("if columns < _PITCH_FROM else", "if True else", [PLAN]),
    ),
    *_of(
        "tdpo_ext/fused/rows.py",
        ("any(b < a for a, b in pairwise(given))", "False", [INPUTS]),
        ("or given[-1] != total", "", [INPUTS]),
        ("moved = self.lengths_on_device.cumsum(0)[order] - lengths.cumsum(0)", "moved = 0 * lengths", [LINEAR]),
        ("counted = running[offsets.clamp(0, total)]", "counted = offsets", [INPUTS]),
        (
            "        index = torch.arange(len(labels), device=labels.device)\n        return Rows(index, lengths,",
            "        index = (labels != ignore_index).nonzero()[:, 0]\n        return Rows(index, lengths,",
            [WAITS],
        ),
    ),
    *_of(
        "tdpo_ext/fused/gradients.py",
        (
            "product(dz.t(), hidden, self._target(columns), accumulate=accumulate)",
            "product(dz.t(), hidden, self._target(columns))",
            [LINEAR],
        ),
        ("scaled = self._grad[index] * factor", "scaled = self._grad[index]", [DEFERRED]),
        ("            total.mul_(factor)", "            pass", [DEFERRED]),
        ("total.addcmul_(summed[rows], factor)", "total.add_(summed[rows])", [DEFERRED]),
        ("        self._sums.addcmul_(other._sums, factor)", "        self._sums.add_(other._sums)", [DEFERRED]),
        ("                out *= factors.of_rows()", "                pass", [DEFERRED]),
        (
            "scaled = (hidden * factors.of_rows()).to(hidden.dtype) if factors.any else hidden",
            "scaled = hidden",
            [DEFERRED],
        ),
        ("total if factor is None else total * factor", "total", [DEFERRED]),
        ("for some in slices(len(total), _ROUNDED_ROWS):", "for some in slices(len(total), 7)[::-1]:", [LINEAR]),
        (
            "        if self._empty:  # no rows\n            return self._grad.zero_()\n",
            "        if self._empty:  # no rows\n            return self._grad\n",
            [LINEAR],
        ),
    ),
    *_of(
        "tdpo_ext/fused/chunked.py",
        ("if wanted.weight and plan.sums_weight:", "if False:", [LINEAR]),
        ("replace(kept, factor=slope)", "kept", [DEFERRED]),
        ("if overwritten or self.kept_rows + rows > self.plan.dz_rows:", "if overwritten:", [DEFERRED]),
        ('values[TokenDivergence._fields.index("tokens")] = labels != inputs.options.ignore_index', "pass", [DEFERRED]),
    ),
    *_of(
        "tdpo_ext/fused/streaming.py",
        (
            "LMHead(ref_hidden, ref_weight, ref_bias, ctx.ref_scale)",
            "LMHead(ref_hidden, ref_weight, ref_bias)",
            [REFERENCES],
        ),
        (
            "Buffer((plan.columns, inputs.policy.width), inputs.logit_dtype)",
            "Buffer((plan.columns, inputs.policy.width), inputs.weight_dtype)",
            [LINEAR],
        ),
        (
            "save_for_backward(hidden, weight, bias, ref_hidden, ref_weight,",
            "save_for_backward(hidden, weight, bias, ref_hidden.clone(), ref_weight,",
            [OBJECTIVES],
        ),
        ("options=inputs.options.from_column(columns.start),", "options=inputs.options,", [LINEAR]),
        (
            "has_kl, has_logps = kl_grad != 0, (kl_grad == 0) & (logps_grad != 0)",
            "has_kl, has_logps = kl_grad != 0, kl_grad != kl_grad",
            [LINEAR],
        ),
    ),
    *_of(
        "tdpo_ext/fused/upstream.py",
        ("return losses.sum() / self.total_pairs", "return losses.sum() / chunk.pairs", [LINEAR]),
        ("both = self.chunk.segments.spread(both)", "both = self.chunk.segments.spread(both.flip(0))", [LINEAR]),
        (
            "rejected=side_rows(slice(middle, None), lengths[chunk.pairs :]),",
            "rejected=side_rows(slice(middle, None), lengths[: chunk.pairs]),",
            [PER_TOKEN],
        ),
    ),
    *_of(
        "tdpo_ext/fused/inputs.py",
        ("    ranks.check_same(_AGREED_ON)\n", "", [FAULTS]),
        ('            "reverse_kl": inputs.options.reverse_kl,\n', "", [FAULTS]),
        ("return out if self.scale == 1 else out.mul_(self.scale)", "return out", [REFERENCES]),
        ("            ref = ref.cast(torch.float64)\n", "            pass\n", [REFERENCES]),
        ("if ref_hidden.dtype == torch.float64 != hidden.dtype:", "if False:", [REFERENCES]),
        ('min(ranks.by_rank["budget"])', 'ranks.by_rank["budget"][0]', [FAULTS, SHARDED]),
        ('            "labels": digest(inputs.labels[rows.index]),\n', "", [FAULTS]),
        ('            "softcap": inputs.options.softcap,\n', "", [FAULTS]),
        ("            out += self.bias[columns]\n", "            pass\n", [LINEAR]),
    ),
    *_of(
        "tdpo_ext/fused/options.py",
        ("temperature=self.temperature / self.logit_scale,", "temperature=self.temperature,", [REFERENCES]),
        ("else self.softcap / self.logit_scale,", "else self.softcap,", [REFERENCES]),
    ),
    *_of(
        "tdpo_ext/objectives.py",
        (
            "        for pair in range(_PAIRS):\n            alone",
            "        for pair in range(0):\n            alone",
            [OBJECTIVES],
        ),
        ("_PAIRS = 3\n", "_PAIRS = 2\n", [OBJECTIVES]),
        ("        if not losses.isfinite().all():", "        if False:", [OBJECTIVES]),
        ("        _check_linear(objective, device, columns)\n    return", "        pass\n    return", [DEFERRED]),
        ("return (id(objective.__self__), objective.__func__)", "return None", [OBJECTIVES]),
        ("and _accepted[key].reference() is not None", "", [OBJECTIVES]),
        ("return torch.segment_reduce(values.double(),", "return torch.segment_reduce(values,", [DEFERRED]),
    ),
    *_of(
        "tdpo_ext/losses.py",
        ("rejected.kl - chosen.kl.detach()", "rejected.kl - chosen.kl", [LOSSES]),
        ("return logratios - alpha *", "return logratios - 0.5 *", [LOSSES]),
        ("    if chosen.logps.shape != rejected.logps.shape:", "    if False:", [BAD]),
    ),
    *_of(
        "tdpo_ext/vocab_parallel.py",
        ("        if self._failure is None:\n            try:", "        if True:\n            try:", [FAULTS]),
        (
            "        if not bool(self.shard.all_gather(succeeded).all()):",
            "        if self._failure is not None:",
            [FAULTS],
        ),
        ("    if flat.is_floating_point():\n", "    if False:\n", [FAULTS]),
    ),
    *_of(
        "tdpo_ext/checks.py",
        (
            "if isinstance(value, bool) or not isinstance(value, Integral):",
            "if not isinstance(value, Integral):",
            [BAD],
        ),
        ("    if not math.isfinite(number):", "    if False:", [BAD]),
        ("if value.layout != torch.strided or value.is_quantized:", "if value.is_quantized:", [BAD]),
    ),
    *_of(
        "tdpo_ext/ops/matmul.py",
        ("        result.copy_(exact)\n", "        result.copy_(exact)\n        break\n", [OPS]),
        ("        if _may_overlap(out, operand):", "        if False:", [OPS]),
        ("    if not accumulate:\n        out.zero_()", "    out.zero_()", [OPS]),
        ("beta=1 if accumulate else 0", "beta=1", [OPS]),
    ),
    *_of(
        "tdpo_ext/ops/_load.py",
        ("if _release(torch.__version__) < _release(built.OLDEST_TORCH):", "if False:", [BUILD]),
        ("if _release(torch.__version__) != _release(built.TORCH):", "if False:", [BUILD]),
    ),
    *_of(
        "csrc/row_state.h",
        (
            "moved_size <= other_sum + weight_sum + size_of(natural_gap)",
            "moved_size >= X{}",
            [PEAKED],
        ),
        ("return masked ? -kLargestExponent<Real> : top;", "return masked ? top : top;", [PEAKED]),
        ("return std::fabs(z - r) > Real(16);", "return std::fabs(z - r) > Real(1600);", [PEAKED]),
        (
            "gap = Real(double(z) - double(r) - double(offset) * double(inv_temp.base2));",
            "gap = z - r - offset * inv_temp.base2;",
            [PEAKED],
        ),
        ("if (std::fabs(z) > std::fabs(r))", "if (false)", [PEAKED]),
        ("hop = kReverse ? r_hop - z_hop : z_hop - r_hop;", "hop = z_hop - r_hop;", [REVERSE]),
        ("mean_gap(kReverse ? state.sums.gap / state.sums.weight_sum() : Real(0))", "mean_gap(0)", [REVERSE]),
        ("kReverse ? kLn2 : -1", "kReverse ? 1 : -1", [REVERSE]),
    ),
    *_of(
        "csrc/cpu/row_kernels.cpp",
        ("if (label >= begin && label < end) {", "if (label > begin && label < end) {", [OPS]),
    ),
    *_of(
        "csrc/cpu/operators.cpp",
        ("  check_label_range(inputs.params);\n  const auto gradient", "  const auto gradient", [OPS]),
    ),
    *_of(
        "csrc/cpu/brgemm.cpp",
        ("accumulate || k.begin > 0", "accumulate", [OPS]),
    ),
    *_of(
        "csrc/checks.h",
        ("check_value(same_memory(out, logits) || !may_overlap(out, logits),", "check_value(true,", [OPS]),
    ),
]
