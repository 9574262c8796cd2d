"""The README.md that is saved with a model."""

from __future__ import annotations

from torch import nn
from transformers.training_args import OptimizerNames

from .config import TDPOConfig

CITATION = """@inproceedings{zeng2024tdpo,
  title     = {Token-level Direct Preference Optimization},
  author    = {Zeng, Yongcheng and Liu, Guoqing and Ma, Weiyu and Yang, Ning and Zhang, Haifeng and Wang, Jun},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}"""


def model_card(model: nn.Module, args: TDPOConfig) -> str:
    """Markdown: the base model, the training options, and the paper to cite."""
    base = getattr(model.config, "_name_or_path", "")
    header = ["---", "library_name: transformers", "tags: [tdpo, preference-optimization]"]
    if base:
        header.append(f"base_model: {base}")
    loss = f"{args.variant.upper()}, beta {args.beta:g}"
    if args.variant == "tdpo2":
        loss += f", alpha {args.alpha:g}"
    return "\n".join(
        [
            *header,
            "---",
            "",
            "# A model aligned by token-level direct preference optimization",
            "",
            f"Trained from `{base or 'a model given in memory'}` with tdpo_ext: {loss}; "
            f"learning rate {args.learning_rate:g}, {OptimizerNames(args.optim).value}.",
            "",
            "The method is that of [arXiv 2404.11999](https://arxiv.org/abs/2404.11999):",
            "",
            "```bibtex",
            CITATION,
            "```",
            "",
        ]
    )
