#!/bin/sh
# Runs the demo, or says what is there and continues it. Nothing of an earlier run is removed.
set -eu
run=${RUN:-runs/demo}
bin=${VENV:-.venv}/bin
if [ "${FRESH:-}" ] && [ -d "$run" ]; then
    kept="$run-$(date +%Y%m%d-%H%M%S)"
    mv "$run" "$kept"
    echo "the earlier run was moved to $kept"
fi
if [ -f "$run/metrics.jsonl" ]; then
    last=$(ls "$run/checkpoints" 2>/dev/null | grep -v partial | tail -n 1 || true)
    echo "$run holds a run (newest checkpoint: ${last:-none}); continuing it. To start anew: make demo FRESH=1"
fi
exec "$bin/python" -m launch local --processes 2 -- experiment=demo parallel.expert=2 "run.dir=$run"
