#!/usr/bin/env bash
# Everything that needs a GPU, in stages that each end within 8 minutes:
#   benchmarks/gpu_suite.sh [--out FOLDER] [--model FOLDER] [--outputs N] [--again] STAGE...
# Stages: tests, kernels, ladder, memory (what the allocator hands out, phase by phase), plans (every strategy of a
# budget, beside what was foretold), peers (diffusers eager), compiled
# (and torch.compile in its default mode), autotuned (and max-autotune), turns (diffusers compiled, request by request in
# turns), warm (fills torch's compiler cache for turns: side by side, nothing timed).
# Rows go at once into FOLDER, by default benchmarks/results: of the peers, variant by variant; of turns, when the last turn
# is taken. A stage that is called again leaves out what FOLDER holds from the same sources on such a machine, so one that
# was cut short goes on (peers beside ritocco anew, which is measured with them; tests from the start); --again measures
# all of it once more.
# --model: a diffusers folder, made of random weights where there is none. --outputs: of the stages after it, how many
# pictures a request asks for (turns take 1,2,4 too).
# Needs torch with CUDA and Triton; the peers also diffusers and transformers. No network; works from the sources.
# STAGE_SECONDS, 470 by default, is when a stage is cut short.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="engine:kernels:export:benchmarks:tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out=benchmarks/results
model=.cache/bench/full
named=""
outputs=1
status=0
resume=--resume
parallel=""
limit=${STAGE_SECONDS:-470}
ends=0
running=""
trap 'kill -TERM $running 2>/dev/null; exit 130' INT TERM HUP
python3 -c 'import xdist' 2>/dev/null && parallel="-n 8"

# A command of a stage, stopped with all that it started when the stage's time is over.
start() {
    local left=$((ends - SECONDS))
    timeout --kill-after=5 "$((left > 1 ? left : 1))" python3 "$@" &
    running="$running $!"
}

# Wait for all that runs: the status of the last that failed.
finish() {
    local found=0 one code
    for one in $running; do
        wait "$one"
        code=$?
        [ $code -eq 0 ] || found=$code
        case $code in 124 | 137) echo "cut short after $limit s" >&2 ;; esac
    done
    running=""
    return $found
}

within() {
    start "$@"
    finish
}

# The model's folder; one that was named is not written into where it is there.
folder() {
    if [ -n "$named" ] && [ -e "$model" ]; then
        [ ! -d "$model" ] || [ -f "$model/model_index.json" ] && return
        echo "$model: holds no model_index.json; name a diffusers folder, or one that is not there" >&2
        return 1
    fi
    within -m ritocco_bench make-folder --out "$model"
}

[ $# -gt 0 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "torch sees no CUDA device here: nothing was run" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    ends=$((SECONDS + limit))
    case "$1" in
    --out) out=$2; shift 2 ;;
    --model) model=$2; named=yes; shift 2 ;;
    --outputs) outputs=$2; shift 2 ;;
    --again) resume=""; shift ;;
    tests)
        within -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark $parallel \
            tests/kernels tests/engine/test_fast_path.py tests/engine/test_device.py tests/engine/test_float16_range.py ||
            status=1
        shift ;;
    memory)
        folder && within -m ritocco_bench.gpu_memory --model "$model" --out "$out/gpu-memory.jsonl" $resume || status=1
        shift ;;
    plans)
        folder && within -m ritocco_bench.gpu_plans --model "$model" --out "$out/gpu-plans.jsonl" $resume || status=1
        shift ;;
    warm)
        if folder; then
            for pictures in 1 2 4; do
                start -m ritocco_bench.worker "{\"variant\": \"diffusers-compiled\", \"model\": \"$model\", \
                    \"device\": \"cuda\", \"dtype\": \"float16\", \"size\": 512, \"steps\": 1, \"until\": \"picture\", \
                    \"outputs\": $pictures, \"runs\": 0}" /dev/null
            done
            finish || status=1
        else
            status=1
        fi
        shift ;;
    turns)
        folder && within -m ritocco_bench turns --model "$model" --device cuda --size 512 --steps 25 --pairs 7 \
            --outputs "$outputs" --peers diffusers-compiled --out "$out/gpu-turns.jsonl" $resume || status=1
        shift ;;
    kernels)
        within -m ritocco_bench.kernel_floors --out "$out/kernels.jsonl" $resume || status=1
        shift ;;
    ladder)
        folder && within -m ritocco_bench.ladder --model "$model" --out "$out/ladder.jsonl" \
            --profile "$out/profile.txt" $resume || status=1
        shift ;;
    peers | compiled | autotuned)
        peers=""
        [ "$1" = peers ] || peers=diffusers-$1
        folder && within -m ritocco_bench steps --model "$model" --device cuda --size 512 --steps 25 --pairs 1 --runs 7 \
            --warm 3 --outputs "$outputs" --peers "$peers" --out "$out/$1.jsonl" $resume || status=1
        shift ;;
    *) echo "unknown stage: $1" >&2; exit 2 ;;
    esac
done
exit $status
