"""Make tests/fixtures/trl_grpo.npz: what TRL's GRPOTrainer computes on a tiny llama, with a truly
different old policy.

Runs in an environment of its own (torch 2.13.0, trl 1.16.0, transformers 5.x, datasets, numpy); the
tests need only the file. TRL's `_compute_loss` is private, so the version is pinned. Usage: python
scripts/trl_fixtures_grpo.py
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

VOCAB = 40
PROMPT = 5
LENGTH = 12
ANSWERS = 8
GROUP = 4
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
    "dapo": {"loss_type": "dapo"},
    "dapo_clip_higher": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo_temperature": {"loss_type": "dapo", "temperature": 0.7},
    "grpo_accumulated": {"loss_type": "grpo", "accumulate": 2},
    "dapo_accumulated": {"loss_type": "dapo", "accumulate": 2},
}


def model(seed: int, jitter: float) -> LlamaForCausalLM:
    """The base model, its weights moved by N(0, jitter)."""
    torch.manual_seed(1)
    made = LlamaForCausalLM(
        LlamaConfig(**CONFIG, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(jitter * torch.randn(p.shape, generator=generator))
    return made.float()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 ... w39, and what every tokenizer has."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def trainer(words: PreTrainedTokenizerFast, **settings: Any) -> trl.GRPOTrainer:
    """TRL's trainer of the policy, as a user builds it."""
    accumulate = settings.pop("accumulate", 1)
    args = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        per_device_train_batch_size=ANSWERS // accumulate,
        gradient_accumulation_steps=accumulate,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        scale_rewards="none" if settings["loss_type"] == "dr_grpo" else "group",
        use_bias_correction_kl=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **{k: v for k, v in settings.items() if k != "beta"},
    )
    data = Dataset.from_list([{"prompt": "w4 w5 w6 w7 w8"}] * ANSWERS)
    made = trl.GRPOTrainer(
        model=model(5, 0.02),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=data,
        processing_class=words,
    )
    made.beta = settings.get(
        "beta", 0.0
    )  # given to the trainer it would load a reference from the hub
    return made


def main() -> None:
    """All cases into one file: inputs, then loss and gradients of each."""
    rng = np.random.default_rng(3)
    words = tokenizer()
    prompts = torch.tensor(rng.integers(4, VOCAB, (ANSWERS, PROMPT)))
    answers = torch.tensor(rng.integers(4, VOCAB, (ANSWERS, LENGTH)))
    lengths = rng.integers(3, LENGTH + 1, ANSWERS)
    mask = torch.tensor((np.arange(LENGTH)[None] < lengths[:, None]).astype(np.int64))
    rewards = torch.tensor(rng.random((ANSWERS // GROUP, GROUP)).astype(np.float32))
    tokens = torch.cat([prompts, answers], 1)
    seen = torch.cat([torch.ones_like(prompts), mask], 1)
    old = model(6, 0.015)
    reference = model(7, 0.0)

    def logps(of: LlamaForCausalLM, temperature: float) -> torch.Tensor:
        with torch.no_grad():
            z = of(input_ids=tokens, attention_mask=seen).logits[:, PROMPT - 1 : -1] / temperature
        return torch.log_softmax(z, -1).gather(-1, answers[..., None]).squeeze(-1)

    found: dict[str, Any] = {"tokens": tokens, "mask": mask, "rewards": rewards}
    found |= {
        f"policy/{k}": v for k, v in model(5, 0.02).state_dict().items() if k != "lm_head.weight"
    }
    for name, settings in CASES.items():
        made = trainer(words, **settings)
        accumulate = settings.get("accumulate", 1)
        # llama has no dropout here; TRL divides by the micro-batches in this mode only
        made.model.train()
        made.current_gradient_accumulation_steps = accumulate
        apart = rewards - rewards.mean(1, keepdim=True)
        if settings["loss_type"] != "dr_grpo":
            apart = apart / (rewards.std(1, keepdim=True) + 1e-4)
        before = logps(old, made.temperature)
        ref = logps(reference, made.temperature)
        made.model.zero_grad()
        total = 0.0
        for at in torch.arange(ANSWERS).chunk(accumulate):
            batch = {
                "prompt_ids": prompts[at],
                "prompt_mask": torch.ones_like(prompts[at]),
                "completion_ids": answers[at],
                "completion_mask": mask[at],
                "advantages": apart.view(-1)[at],
                "old_per_token_logps": before[at],
                "ref_per_token_logps": ref[at],
                "num_items_in_batch": mask.sum(),
            }
            loss = made._compute_loss(made.model, batch)
            loss.backward()
            total += loss.item()
        found |= {
            f"{name}/loss": np.float64(total),
            f"{name}/advantages": apart,
            f"{name}/old": before,
        }
        found |= {f"{name}/ref": ref} if made.beta else {}
        found |= {
            f"{name}/grad/{k}": p.grad
            for k, p in made.model.named_parameters()
            if k != "lm_head.weight"
        }
        print(name, total)
    versions = {"torch": torch.__version__, "trl": trl.__version__}
    about = json.dumps({"cases": CASES, "max_tokens": LENGTH, "prompt": PROMPT, **versions})
    found["config"] = json.dumps(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    path = Path(__file__).parent.parent / "tests" / "fixtures" / "trl_grpo.npz"
    np.savez_compressed(path, about=about, **{k: np.asarray(v) for k, v in found.items()})
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
