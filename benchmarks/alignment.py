"""What sft and dpo do to the default teacher in minutes: held-out loss of answers; margin and
likelihood of pairs.

    scripts/mis benchmarks/alignment.py sft     # about 5 minutes on one core
    scripts/mis benchmarks/alignment.py dpo     # about 8: DPO-Positive, then plain DPO, both from
    the student of `sft`

Data: the generated tasks, held-out ones of other problems (mis_mlx/data/tasks). Runs are left under
runs/alignment/. Writes benchmarks/results/<machine>/alignment-sft.json and alignment-dpo.json.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from laboratory import write

from mis_mlx import dpo, sft
from mis_mlx.alignment.alignment_run import HELD_OUT
from mis_mlx.storage import run_folder

RUNS = Path("runs/alignment")
SFT = sft.Settings(iters=14, batch_size=2, max_seq_length=512, save_every=7, eval_rows=32)
DPO = dpo.Settings(iters=12, batch_size=2, grad_accumulation_steps=2, save_every=4, eval_rows=16)
TOLD = (
    "iters",
    "batch_size",
    "grad_accumulation_steps",
    "max_seq_length",
    "learning_rate",
    "seed",
    "eval_rows",
)


def told(command: Any, settings: Any, name: str) -> dict[str, Any]:
    """Run the command in runs/alignment/NAME, anew; what was measured at its checkpoints, and its
    result.
    """
    out = RUNS / name
    shutil.rmtree(out, ignore_errors=True)
    result = command.run(replace(settings, out=str(out)))
    keys = ("best_step", "params_trained", "tokens", "tokens_per_s", "peak_bytes", "seconds")
    held_out = []
    for record in run_folder.records(out / HELD_OUT):
        held_out.append({key: round(value, 4) for key, value in record.items()})
    asked = {key: getattr(settings, key) for key in TOLD}
    losses = [round(r["loss"], 4) for r in run_folder.metrics(out)]
    return {
        "settings": asked,
        "held_out": held_out,
        "losses": losses,
        **{k: result[k] for k in keys},
    }


def main(what: str) -> None:
    """Measure and store."""
    command = f"scripts/mis benchmarks/alignment.py {what}"
    if what == "sft":
        write("alignment-sft", command, told(sft, SFT, "sft"))
        return
    model = RUNS / "sft" / "model"
    if not model.is_dir():
        raise SystemExit(
            f"{model} is not there: run `scripts/mis benchmarks/alignment.py sft` first"
        )
    start = replace(DPO, model=str(model))
    kinds = {kind: replace(start, loss_type=kind) for kind in ("dpop", "sigmoid")}
    common = {"beta": DPO.beta, "dpop_lambda": DPO.dpop_lambda}
    write(
        "alignment-dpo",
        command,
        common | {kind: told(dpo, s, f"dpo-{kind}") for kind, s in kinds.items()},
    )


if __name__ == "__main__":
    main(sys.argv[1])
