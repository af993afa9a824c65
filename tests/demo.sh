#!/usr/bin/env bash
# The demo: the commands a user types, on the committed slide. DEMO is the folder it writes,
# PY the interpreter. Run it through `make demo`.
set -euo pipefail
export PYTHONSAFEPATH=1 OMP_WAIT_POLICY=PASSIVE
DEMO=${DEMO:-demo}
PY=${PY:-.venv/bin/python}
# Real weights that a package carries, trained on photographs: H0-mini's are gated.
ENCODER=(--encoder efficientnet-lite0 --weights package)
began=$SECONDS

step() {
    printf '\n$ python %s\n' "$*"
    "$PY" "$@"
}

step -m pipeline scan tests/data/slides --terms CC0-1.0 --dataset "$DEMO/dataset"
step -m pipeline tissue --dataset "$DEMO/dataset"
step -m pipeline select --dataset "$DEMO/dataset" --name train
step -m pipeline tile --dataset "$DEMO/dataset" --selection train
step -m pipeline cache --dataset "$DEMO/dataset" "${ENCODER[@]}" --tokens float16
step -m pipeline verify --dataset "$DEMO/dataset"
step -m pipeline report --dataset "$DEMO/dataset"
step -m train --config tiny data.dataset="$DEMO/dataset" run.dir="$DEMO/run"
step -m train export "$DEMO/run" "$DEMO/model"
step -m evaluate generate --model "$DEMO/model" --guidance "$DEMO/dataset" --selection train \
    --limit 32 --steps 25 --out "$DEMO/synthetic"
step -m pipeline cache --dataset "$DEMO/synthetic" "${ENCODER[@]}" --tokens none
step -m evaluate measure --real "$DEMO/dataset" --real-selection train --generated "$DEMO/synthetic" \
    --encoder efficientnet-lite0 --out "$DEMO/results.json"
step -m evaluate report --results "$DEMO/results.json" --run "$DEMO/run" --dataset "$DEMO/dataset" \
    --generated "$DEMO/synthetic" --out "$DEMO/report.html" --picture "$DEMO/picture.png"

printf '\nThe demo took %d min %02d s. Open %s/report.html (the model) and\n%s/dataset/report/index.html (the slides) in a browser.\n' \
    $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$DEMO" "$DEMO"
