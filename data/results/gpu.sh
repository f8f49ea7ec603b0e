#!/bin/sh
# Public checkpoints on a GPU: what each is, and what adapting it takes, as one table each.
#   data/results/gpu.sh /models/LLaDA-8B-Instruct /models/Dream-v0-Instruct-7B /models/Qwen3-0.6B-diffusion-mdlm-v0.1
# Without folders: a model of Qwen3-0.6B's shape with random weights. DTYPES, STEPS, ROWS and LENGTH may be set.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
for dtype in ${DTYPES:-bf16 int8}; do
    for folder in "${@:---}"; do
        if [ "$folder" = "--" ]; then
            set_folder=""
        else
            PYTHONPATH=. $python -m tinyld info "$folder"
            set_folder="--folder=$folder"
        fi
        # full fine-tuning of 7 to 8 billion parameters needs 16 bytes for each: leave it to the small ones
        runs="fast best weight-lora adapters bitfit peft-lora"
        PYTHONPATH=. $python data/results/foreign.py ${set_folder:+"$set_folder"} --device "${DEVICE:-cuda}" \
            --dtype "$dtype" --steps "${STEPS:-20}" --rows "${ROWS:-8}" --length "${LENGTH:-256}" \
            --runs ${RUNS:-$runs} ${SHAPE:+--shape "$SHAPE"}
        echo
    done
done
