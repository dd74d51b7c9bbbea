#!/usr/bin/env bash
# Adapt a backbone, and put it into service only if it is better beyond doubt on labelled images.
#
#   examples/gate_pipeline.sh BACKBONE DATA LABELS RUN [OPTION OF adaptkit adapt]...
#
# IN_SERVICE is a link to the backbone that is in service. GAIN is what the lower end of the 95 % interval must reach.
# The exit code is adaptkit's own, so the caller can tell the endings apart too.
set -euo pipefail

[ $# -ge 4 ] || { echo "usage: $0 BACKBONE DATA LABELS RUN [OPTION OF adaptkit adapt]..." >&2 && exit 2; }
backbone=$1 data=$2 labels=$3 run=$4
shift 4
in_service=${IN_SERVICE:-backbone-in-service}
gain=${GAIN:-knn_top1>=0.5}
result=$run.json
mkdir -p "$(dirname "$run")"

code=0
adaptkit adapt --backbone "$backbone" --data "$data" --labels "$labels" --output "$run" \
    --require-gain "$gain" "$@" --json > "$result" || code=$?

for _ in 1 2 3; do # interrupted with the state saved, as on a machine that may be taken away
    [ "$code" -eq 75 ] || break
    code=0
    adaptkit resume "$run" --json > "$result" || code=$?
done

case $code in
0)
    # Two steps, because only a rename is atomic: whoever loads the backbone meanwhile gets the old one or the new one.
    ln -sfn "$(realpath "$run/backbone")" "$in_service.new"
    mv -T "$in_service.new" "$in_service" # GNU; on macOS: mv -h
    echo "promoted: $in_service is now $run/backbone"
    ;;
5) echo "not promoted: the gain $gain was not reached; see $run/report.md" ;;
6) echo "not promoted: training collapsed; see $run/report.md" ;;
75) echo "not promoted: interrupted again and again; go on with: adaptkit resume $run" ;;
*) echo "not promoted: adaptkit failed with exit code $code; see $result" ;;
esac
exit "$code"
