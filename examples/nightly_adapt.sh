#!/usr/bin/env bash
# Adapt tonight's images, and put the backbone into service only if it is better beyond doubt on labelled images.
#
#   examples/nightly_adapt.sh BACKBONE DATA LABELS RUNS IN_SERVICE [OPTION OF adaptkit adapt]...
#
# RUNS/NIGHT is the run, RUNS/NIGHT.log what it said, RUNS/NIGHT.json its result. IN_SERVICE is a link to the backbone
# that is in service; IN_SERVICE.previous to the one before it. Back: mv -T IN_SERVICE.previous IN_SERVICE
#
# NIGHT names the run (default: today's date), GAIN is what the lower end of the 95 % interval must reach. Given again
# in the same night, it goes on where the run stopped. The exit code is adaptkit's own; 75 also where another one is at
# work. Only 0 changes what is in service. Needs bash, GNU coreutils and flock of util-linux.
set -euo pipefail

if [ $# -lt 5 ]; then
    echo "usage: $0 BACKBONE DATA LABELS RUNS IN_SERVICE [OPTION OF adaptkit adapt]..." >&2
    exit 2
fi
backbone=$1 data=$2 labels=$3 runs=$4 in_service=$5
shift 5
while [[ $in_service == ?*/ ]]; do in_service=${in_service%/}; done # with the slash a link is taken for its folder
gain=${GAIN:-knn_top1>=0.5}
run=$runs/${NIGHT:-$(date +%F)}

if [ -e "$in_service" ] && [ ! -L "$in_service" ]; then
    echo "$in_service is no link, so it is not replaced; move it away" >&2
    exit 2
fi
mkdir -p -- "$runs" "$(dirname -- "$in_service")"
exec 9> "$runs/lock" # adaptkit keeps it too, so that a script that was killed does not let a second one in
if ! flock --nonblock 9; then
    echo "another one is at work in $runs" >&2
    exit 75
fi

child='' stopped=''
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true' TERM INT HUP

adaptkit_command() { # its exit code is in $code; a signal to this script has it save its state
    adaptkit "$@" --json > "$run.json" 2>> "$run.log" &
    child=$!
    while
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2> /dev/null # true: it was the signal that ended `wait`
    do :; done
    child=''
}

link() { # LINK TARGET; in two steps, because only a rename is atomic: who looks meanwhile sees the old or the new
    ln -sfn -- "$2" "$1.new"
    mv -T -- "$1.new" "$1"
}

if [ -e "$run/recipe.yaml" ]; then
    adaptkit_command resume "$run"
else
    adaptkit_command adapt --backbone "$backbone" --data "$data" --labels "$labels" --output "$run" \
        --require-gain "$gain" "$@"
fi
for _ in 1 2 3; do # interrupted with the state saved, but nobody asked this script to stop
    if [ "$code" -ne 75 ] || [ -n "$stopped" ] || [ ! -e "$run/recipe.yaml" ]; then break; fi
    adaptkit_command resume "$run"
done

case $code in
0)
    new=$(realpath -- "$run/backbone")
    if [ "$new" != "$(realpath -m -- "$in_service")" ]; then
        if [ -L "$in_service" ]; then link "$in_service.previous" "$(realpath -m -- "$in_service")"; fi
        link "$in_service" "$new"
    fi
    echo "promoted: $in_service is $new; see $run/report.html"
    ;;
5) echo "not promoted: the gain $gain was not reached; see $run/report.html" ;;
6) echo "not promoted: training collapsed; see $run/report.html" ;;
7) echo "not promoted: out of GPU memory; see $run.log" ;;
75) echo "not promoted: interrupted; the same command goes on, or: adaptkit resume $run" ;;
*) echo "not promoted: adaptkit ended with exit code $code; see $run.log" ;;
esac
exit "$code"
