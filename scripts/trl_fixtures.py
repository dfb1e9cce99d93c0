"""Make tests/fixtures/trl_preference.npz: what TRL's SFT and DPO trainers compute on a tiny llama,
and DPO-P in torch.

Runs in an environment of its own (made with torch 2.13.0, trl 1.16.0, transformers 5.24.0, datasets
5.2.0); the tests need only the file. TRL's `_compute_loss` is private, so the version is pinned.
TRL has no DPO-P: its formula (arXiv 2402.13228 eq. 3) is computed in torch on the batch of TRL's
DPOTrainer. Usage: python scripts/trl_fixtures.py
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

OUT = Path(__file__).parents[1] / "tests" / "fixtures" / "trl_preference.npz"
VOCAB = 40
ROWS = 4
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
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
TRL_CASES = {"sigmoid": 0.3, "hinge": 0.3, "ipo": 0.3}  # loss type: beta
DPOP_CASES = {
    "dpop": (0.3, 50.0),
    "dpop_mild": (0.1, 5.0),
    "dpop_zero": (0.3, 0.0),
}  # (beta, lambda)
COMMON: dict[str, Any] = {
    "output_dir": tempfile.mkdtemp(),
    "report_to": [],
    "per_device_train_batch_size": ROWS,
    "gradient_checkpointing": False,
    "bf16": False,
    "fp16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "max_length": 64,
}
Found = dict[str, np.ndarray]


def model(jitter: float) -> LlamaForCausalLM:
    """The base model, its weights moved by N(0, jitter)."""
    torch.manual_seed(1)
    made = LlamaForCausalLM(
        LlamaConfig(**CONFIG, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(jitter * torch.randn(p.shape, generator=generator))
    return made.float()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, w4 to w39."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def keep(found: Found, case: str, policy: LlamaForCausalLM, loss: torch.Tensor) -> None:
    """Run the way back; remember the loss and every gradient under the case's name."""
    policy.zero_grad()
    loss.backward()
    found[f"{case}/loss"] = loss.detach().numpy()
    for name, p in policy.named_parameters():
        found[f"{case}/grad/{name}"] = p.grad.numpy().copy()
    print(f"{case:12s} {loss.item():.8f}")


def logps(m: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p of every completion, summed, (2 B,)."""
    logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()[
        :, :-1
    ]
    each = torch.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (each * batch["completion_mask"][:, 1:].float()).sum(-1)


def supervised(
    found: Found, words: PreTrainedTokenizerFast, weights: dict[str, torch.Tensor], rng: Any
) -> None:
    """SFT on completions alone: one batch, and the same rows in two micro-batches of a step."""
    rows = [
        {"prompt": sentence(rng, 3 + i), "completion": " " + sentence(rng, 4 + 2 * i)}
        for i in range(ROWS)
    ]
    args = trl.SFTConfig(**COMMON)
    trainer = trl.SFTTrainer(
        model=model(0.0), args=args, train_dataset=Dataset.from_list(rows), processing_class=words
    )
    trainer.model.load_state_dict(weights)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
    found["sft/ids"], found["sft/labels"] = batch["input_ids"].numpy(), batch["labels"].numpy()
    keep(found, "sft", trainer.model, trainer.compute_loss(trainer.model, dict(batch)))
    count = (batch["labels"][:, 1:] != -100).sum()
    parts = [
        trainer.data_collator([trainer.train_dataset[i] for i in part])
        for part in ((0,), (1, 2, 3))
    ]
    losses = [trainer.compute_loss(trainer.model, dict(p), num_items_in_batch=count) for p in parts]
    keep(found, "sft_parts", trainer.model, sum(losses))


def preferred(
    found: Found, words: PreTrainedTokenizerFast, weights: dict[str, torch.Tensor], rng: Any
) -> None:
    """DPO's losses by TRL, DPO-P's by its formula, all on one batch of pairs."""
    rows = [
        {
            "prompt": sentence(rng, 3 + i),
            "chosen": " " + sentence(rng, 4 + i),
            "rejected": " " + sentence(rng, 7 - i),
        }
        for i in range(ROWS)
    ]
    reference = model(0.0)
    for kind, beta in TRL_CASES.items():
        args = trl.DPOConfig(beta=beta, loss_type=[kind], **COMMON)
        data = Dataset.from_list(rows)
        trainer = trl.DPOTrainer(
            model=model(0.0),
            ref_model=model(0.0),
            args=args,
            train_dataset=data,
            processing_class=words,
        )
        trainer.model.load_state_dict(weights)
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
        keep(found, kind, trainer.model, trainer._compute_loss(trainer.model, dict(batch), False))
    found["dpo/ids"], found["dpo/mask"] = (
        batch["input_ids"].numpy(),
        batch["completion_mask"].numpy(),
    )
    with torch.no_grad():
        before = logps(reference, batch)
    found["dpo/reference"] = before.numpy()
    for case, (beta, weight) in DPOP_CASES.items():
        chosen, rejected = (logps(trainer.model, batch) - before).chunk(2)
        margin = chosen - rejected - weight * torch.relu(-chosen)
        keep(found, case, trainer.model, -torch.nn.functional.logsigmoid(beta * margin).mean())
    found["dpo/rewards"] = torch.cat([chosen, rejected]).detach().numpy()


def sentence(rng: Any, words: int) -> str:
    """So many random words."""
    return " ".join(f"w{i}" for i in rng.randint(4, VOCAB, words))


def main() -> None:
    """Write the fixture."""
    if trl.__version__ != "1.16.0":
        raise SystemExit(f"trl is {trl.__version__}, the fixtures are of 1.16.0")
    torch.set_num_threads(1)
    policy = model(0.02).state_dict()
    words = tokenizer()
    rng = np.random.RandomState(0)
    versions = f"trl {trl.__version__}, torch {torch.__version__}"
    found: Found = {"config": np.array(json.dumps(CONFIG)), "versions": np.array(versions)}
    for role, weights in (("policy", policy), ("reference", model(0.0).state_dict())):
        found |= {f"{role}/{name}": value.numpy() for name, value in weights.items()}
    supervised(found, words, policy, rng)
    preferred(found, words, policy, rng)
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **found)
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes; {found['versions']}")


if __name__ == "__main__":
    main()
