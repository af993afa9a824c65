#!/usr/bin/env bash
# The long demo: a model of the committed slide, trained for an hour and a half on two CPU cores.
# DEMO is the folder it writes, PY the interpreter, CROP_STEP the pixels from tile to tile; what is
# given as arguments goes to the training. An interrupted one goes on. Run it by `make demo-long`.
set -euo pipefail
export PYTHONSAFEPATH=1 PYTHONPATH=$PWD OMP_WAIT_POLICY=PASSIVE
DEMO=${DEMO:-demo-long}
PY=${PY:-.venv/bin/python}
CROP_STEP=${CROP_STEP:-16}
ENCODER=(--encoder efficientnet-lite0 --weights package)
SCAN=(-m pipeline scan tests/data/slides --terms CC0-1.0)

step() {
    printf '\n$ python %s\n' "$*"
    "$PY" "$@"
}

# Dense crops: positions on the tissue that is found first, and then imported.
step "${SCAN[@]}" --dataset "$DEMO/tissue"
step -m pipeline tissue --dataset "$DEMO/tissue"
step tests/dense_positions.py "$DEMO/tissue" "$DEMO/positions" --step "$CROP_STEP"
step "${SCAN[@]}" --dataset "$DEMO/dataset"
step -m pipeline import coordinates train="$DEMO/positions/train.csv" \
    val-below="$DEMO/positions/val-below.csv" --dataset "$DEMO/dataset"
step -m pipeline tile --dataset "$DEMO/dataset"
step -m pipeline cache --dataset "$DEMO/dataset" "${ENCODER[@]}" --tokens float16

# REPA-E first, both networks together. Then the SiT alone on the autoencoder as it is by then: at
# this size three quarters of a step are the autoencoder's.
train() { step -m train --config one-slide data.dataset="$DEMO/dataset" "$@"; }
train run.dir="$DEMO/run-together" "$@"
step -m train export "$DEMO/run-together" "$DEMO/model-together"
train run.dir="$DEMO/run" run.mode=repa run.steps=2000 \
    init.vae="$DEMO/model-together" init.sit="$DEMO/model-together" "$@"
step -m train export "$DEMO/run" "$DEMO/model"

# Tiles of the lower part, which the model has not seen, guide and are what is compared with.
generate() { step -m evaluate generate --model "$DEMO/model" --steps 50 --scale 1.5 "$@"; }
SLIDE=tests/data/slides/CMU-1-Small-Region.svs
generate --guidance "$DEMO/dataset" --selection val-below --limit 128 --out "$DEMO/synthetic"
generate --slide "$SLIDE" --at 576,2581 --at 848,2533 --at 1552,2661 --at 1216,2373 \
    --at 560,2453 --variations 5 --out "$DEMO/varied"
step -m evaluate figure variations --generated "$DEMO/varied" --reconstruct "$DEMO/model" \
    --out "$DEMO/variations"
generate --slide "$SLIDE" --interpolate 576,2581 848,2533 --interpolate 560,2453 1216,2373 \
    --out "$DEMO/between"
step -m evaluate figure interpolation --generated "$DEMO/between" --out "$DEMO/interpolation"
step -m pipeline cache --dataset "$DEMO/synthetic" "${ENCODER[@]}" --tokens none
step -m evaluate measure --real "$DEMO/dataset" --real-selection val-below \
    --generated "$DEMO/synthetic" --guidance "$DEMO/dataset" --train-selection train \
    --encoder efficientnet-lite0 --out "$DEMO/results.json"
step -m evaluate report --results "$DEMO/results.json" --run "$DEMO/run" --dataset "$DEMO/dataset" \
    --generated "$DEMO/synthetic" --out "$DEMO/report.html" --picture "$DEMO/picture.png"
printf '\nOpen %s/report.html in a browser; %s/variations.png and\n%s/interpolation.png have images of unseen tissue.\n' "$DEMO" "$DEMO" "$DEMO"
