"""On-policy distillation with an exact reverse KL over the whole vocabulary, from hidden states.

    python examples/distillation.py        (a minute on a CPU; two small models with a large vocabulary)

The student samples; the teacher says, for every token, how its distribution differs: KL(student || teacher), the loss
of generalised knowledge distillation (arXiv 2306.13649) with on-policy data. `linear_token_loss` gives it without
logits, within a memory budget, and forms its gradient in the forward pass: four matrix products and no recompute at
any length; over a sharded vocabulary with `shard=` too. The teacher may see another prompt, as long as row i of both
predicts labels[i].
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tdpo_ext

VOCABULARY, PROMPT, RESPONSE = 32_000, 4, 12


@tdpo_ext.per_token
def mean_kl(rows: tdpo_ext.TokenRows) -> torch.Tensor:
    """The mean KL over the tokens of each response, (responses,)."""
    return rows.mean(rows.kl)


# Linear in the KL of every token: a MarginLoss, which needs no recompute.
DISTILLATION = tdpo_ext.MarginLoss(mean_kl, link=lambda mean: mean)


def make_model(layers: int, width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config)


def reverse_kl(student: LlamaForCausalLM, teacher: LlamaForCausalLM, sequences: torch.Tensor) -> torch.Tensor:
    """The mean over responses of their mean KL(student || teacher) a token; `sequences` are (B, PROMPT + RESPONSE)."""
    labels = tdpo_ext.shift_labels(sequences)
    labels[:, : PROMPT - 1] = -100  # prompt tokens don't count
    hidden = student.model(input_ids=sequences).last_hidden_state
    with torch.no_grad():
        teacher_hidden = teacher.model(input_ids=sequences).last_hidden_state
    loss, _ = tdpo_ext.linear_token_loss(
        DISTILLATION,
        hidden,
        student.lm_head.weight,
        teacher_hidden,
        teacher.lm_head.weight,
        labels,
        kl_direction="reverse",
        logits_budget=64 << 20,
    )
    return loss


def main(steps: int = 30) -> list[float]:
    """Distils for some steps; returns the KL of each."""
    torch.manual_seed(0)
    teacher, student = make_model(2, 128).eval().requires_grad_(False), make_model(1, 64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    kls = []
    for step in range(steps):
        prompts = torch.randint(VOCABULARY, (16, PROMPT))
        sequences = student.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=RESPONSE, do_sample=True, eos_token_id=None
        )
        loss = reverse_kl(student, teacher, sequences)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kls.append(loss.item())
        print(f"step {step:3d}  KL(student || teacher) {kls[-1]:.3f} nats a token")
    return kls


if __name__ == "__main__":
    main()
