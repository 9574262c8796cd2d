"""The README.md that is saved with a model."""

from __future__ import annotations

CITATION = """@inproceedings{zeng2024tdpo,
  title     = {Token-level Direct Preference Optimization},
  author    = {Zeng, Yongcheng and Liu, Guoqing and Ma, Weiyu and Yang, Ning and Zhang, Haifeng and Wang, Jun},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}"""


def model_card(model, args) -> str:
    """Markdown: what the model was made from and how, and the paper to cite."""
    base = getattr(model.config, "_name_or_path", "") or "a model given in memory"
    head = ["---", "library_name: transformers", "tags: [tdpo, preference-optimization]"]
    if base != "a model given in memory":
        head.append(f"base_model: {base}")
    loss = f"{args.variant.upper()}, beta {args.beta:g}" + (
        f", alpha {args.alpha:g}" if args.variant == "tdpo2" else ""
    )
    return "\n".join(
        [
            *head,
            "---",
            "",
            "# A model aligned by token-level direct preference optimization",
            "",
            f"Trained from `{base}` with tdpo_ext: {loss}; learning rate {args.learning_rate:g}, {args.optim}.",
            "",
            "The method is that of [arXiv 2404.11999](https://arxiv.org/abs/2404.11999):",
            "",
            "```bibtex",
            CITATION,
            "```",
            "",
        ]
    )
