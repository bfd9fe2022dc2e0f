#!/usr/bin/env bash
# Everything that needs a GPU, in stages that each end within 8 minutes:
#   benchmarks/gpu_suite.sh [--out FOLDER] [--model FOLDER] [--outputs N] STAGE...
# Stages: tests, kernels, ladder, memory (what the allocator hands out, phase by phase), peers (diffusers eager), compiled
# (and torch.compile in its default mode), autotuned (and max-autotune), turns (diffusers compiled, request by request in
# turns), warm (fills torch's compiler cache for turns: side by side, nothing timed).
# Rows go into FOLDER, by default benchmarks/results: of kernels, ladder, memory and turns at once, of the
# peers when the stage is done; --outputs, of the stages after it, is how many pictures a request asks for (turns take 1,2,4 too). Needs torch
# with CUDA and Triton; the peers also diffusers and transformers.
# No network; works from the sources.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="engine:kernels:export:benchmarks:tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out=benchmarks/results
model=.cache/bench/full
outputs=1
status=0
parallel=""
python3 -c 'import xdist' 2>/dev/null && parallel="-n 8"
while [ $# -gt 0 ]; do
    case "$1" in
    --out) out=$2; shift 2 ;;
    --model) model=$2; shift 2 ;;
    --outputs) outputs=$2; shift 2 ;;
    tests)
        python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark $parallel tests/kernels tests/engine/test_fast_path.py || status=1
        shift ;;
    memory)
        python3 -m ritocco_bench make-folder --out "$model" &&
            python3 -m ritocco_bench.gpu_memory --model "$model" --out "$out/gpu-memory.jsonl" || status=1
        shift ;;
    warm)
        python3 -m ritocco_bench make-folder --out "$model" || status=1
        for pictures in 1 2 4; do
            python3 -m ritocco_bench.worker "{\"variant\": \"diffusers-compiled\", \"model\": \"$model\", \
                \"device\": \"cuda\", \"dtype\": \"float16\", \"size\": 512, \"steps\": 1, \"until\": \"picture\", \
                \"outputs\": $pictures, \"runs\": 0}" /dev/null &
        done
        wait
        shift ;;
    turns)
        python3 -m ritocco_bench make-folder --out "$model" &&
            python3 -m ritocco_bench turns --model "$model" --device cuda --size 512 --steps 25 --pairs 7 \
                --outputs "$outputs" --peers diffusers-compiled --out "$out/gpu-turns.jsonl" || status=1
        shift ;;
    kernels)
        python3 -m ritocco_bench.kernel_floors --out "$out/kernels.jsonl" || status=1
        shift ;;
    ladder)
        python3 -m ritocco_bench make-folder --out "$model" &&
            python3 -m ritocco_bench.ladder --model "$model" --out "$out/ladder.jsonl" \
                --profile "$out/profile.txt" || status=1
        shift ;;
    peers | compiled | autotuned)
        peers=""
        [ "$1" = peers ] || peers=diffusers-$1
        python3 -m ritocco_bench make-folder --out "$model" &&
            python3 -m ritocco_bench steps --model "$model" --device cuda --steps 25 --pairs 1 --runs 7 --warm 3 \
                --outputs "$outputs" --peers "$peers" --out "$out/$1.jsonl" || status=1
        shift ;;
    *) echo "unknown stage: $1" >&2; exit 2 ;;
    esac
done
exit $status
