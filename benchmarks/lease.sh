#!/usr/bin/env bash
# All that half an hour on a lent GPU is for, in three calls of ten minutes at most, each with what it needs to carry.
#   here, once:   bash benchmarks/lease.sh pack          then run there, one right after the other, the whole of
#   carry .lease/1:   bash benchmarks/lease.sh tests     what only a GPU can show
#   carry .lease/2:   bash benchmarks/lease.sh gpu       images/s beside torch.nn; with the first half of the pictures
#   carry .lease/3:   bash benchmarks/lease.sh accuracy  seconds to the leaderboard's accuracy; with the second half
# What comes back is logs, and RESULTS.md with its new sections. There, nothing can be installed: python3 has torch.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 OUT=${OUT:-/tmp}

logged() { # logged NAME SECONDS COMMAND...: a step that hangs leaves time for the next, and says how far it came
    timeout -s INT -k 15 "$2" "${@:3}" 2>&1 | tee "$OUT/$1.log"
}

case ${1:-} in
pack)
    rm -rf .lease && mkdir -p .lease/{1,2,3,wheels,site}
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d .lease/wheels --constraint constraints.txt \
        ray simplejpeg jsonschema jsonschema-specifications referencing rpds-py
    python3 -m pip download -q --no-deps -d .lease/wheels fastprogress==1.0.3 # later ones need a dozen others
    for wheel in .lease/wheels/*.whl; do unzip -qo "$wheel" -d .lease/site; done
    tar -C .lease/site --exclude ray/jars --exclude ray/rllib --exclude ray/dashboard/client -c . |
        xz -T0 -2 >.lease/1/site.tar.xz
    split -b 42M ../shared/data/imagenette2-160.tgz .lease/part.
    mv .lease/part.aa .lease/2 && mv .lease/part.ab .lease/3
    rm -r .lease/wheels .lease/site
    du -h .lease/*/*
    ;;
tests)
    mkdir -p /tmp/site && python3 -m tarfile -e .lease/1/site.tar.xz /tmp/site || exit # there may be no xz
    nvidia-smi
    here="-m gpu -v -rs --durations 0 -o faulthandler_timeout=100 tests/gpu tests/learner/test_feed.py"
    logged alone 280 python3 -m pytest $here -k "not (group or killed or local)"
    logged groups 70 python3 -m pytest $here -k group
    logged commands 180 python3 -m pytest $here -k "killed or local"
    ;;
gpu)
    ls /tmp/site/ray >"$OUT/there.log" || exit # a fresh machine: begin with `tests` again
    mkdir -p ../shared/data && cp .lease/2/part.aa ../shared/data
    logged gpu 570 python3 -m benchmarks gpu
    cp benchmarks/RESULTS.md "$OUT"
    ;;
accuracy)
    ls /tmp/site/ray ../shared/data/part.aa >"$OUT/there.log" || exit # a fresh machine: begin with `tests` again
    cat ../shared/data/part.aa .lease/3/part.ab >../shared/data/imagenette2-160.tgz
    logged accuracy 570 python3 -m benchmarks imagenette
    cp benchmarks/RESULTS.md "$OUT"
    ;;
*) sed -n '2,8s/^# //p' "$0" ;;
esac
