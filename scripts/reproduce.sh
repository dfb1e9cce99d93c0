#!/bin/sh
# The paper's way from end to end on the default teacher, at a small scale: prune, distil, SFT, DPO-P, GRPO, 4 bits,
# bench, evaluate. `scripts/reproduce.sh [FOLDER]`, by default runs/reproduce; ends with the recovery table.
#
# Killed, it goes on where it was: every stage leaves its result, and a stage that trains resumes. What it shows is
# that the parts fit together; a few steps of each do not make an assistant of 135M parameters.
set -eu

cd "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")/.."
out=${1:-runs/reproduce}
mkdir -p "$out"

# stage RESULT COMMAND [FLAGS]: nothing when RESULT is there.
stage() {
    result=$1
    shift
    [ ! -e "$result" ] || return 0
    echo "reproduce: $*" >&2
    scripts/mis "$@"
}

# train NAME COMMAND [FLAGS]: a stage with a run folder, whose result is NAME/model; goes on from its last checkpoint.
train() {
    run=$out/$1
    shift
    if [ -e "$run/asked.yaml" ] || [ -e "$run/config.yaml" ]; then
        stage "$run/result.json" "$1" --out "$run" --resume
    else
        stage "$run/result.json" "$@" --out "$run"
    fi
}

stage "$out/pruned" prune --mlx-path "$out/pruned"
train distilled distill --student "$out/pruned" --quantize 0 --iters 20 --eval-windows 8
train sft sft --model "$out/distilled/model" --iters 10 --batch-size 2 --save-every 10 --eval-rows 16
train dpo dpo --model "$out/sft/model" --iters 4 --batch-size 2 --save-every 4 --eval-rows 8
train grpo grpo --model "$out/dpo/model" --tasks sums --iters 4 --max-completion-length 48 --save-every 4 --eval-rows 8
stage "$out/4bit" quantize --model "$out/grpo/model" --mlx-path "$out/4bit" --q-iters 4

teacher=HuggingFaceTB/SmolLM2-135M-Instruct
scripts/mis bench --model "$teacher" --model "$out/grpo/model" --model "$out/4bit"
scripts/mis evaluate --teacher "$teacher" --students "$out/pruned" "$out/distilled/model" "$out/grpo/model" "$out/4bit" \
    --tasks builtin --num-questions 40 --out "$out/evaluate"
