#!/usr/bin/env bash
# wheel.sh [PYTHON...]: what a user gets who installs the wheel, for each interpreter (default: python3) in a fresh environment that is removed again.
#
# The wheel is built from this tree; pip takes what pyproject.toml asks for. Then, outside the repository: the commands that need no torch,
# and a small build of one file of the bundled checkpoint with its check. One line a Python: versions, seconds, megabytes.
# LIGHT=1: without torch and transformers (six gigabytes with CUDA), and only what needs neither.
set -euo pipefail
tree=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip wheel -q --no-deps --disable-pip-version-check -w "$work" "$tree"
wheel=$(echo "$work"/qquant-*.whl)

pythons=("$@")
[ ${#pythons[@]} -gt 0 ] || pythons=(python3)
for python in "${pythons[@]}"; do
    environment=$work/environment start=$SECONDS
    "$python" -m venv "$environment"
    if [ -n "${LIGHT:-}" ]; then
        needs=$(unzip -p "$wheel" '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -vE 'extra ==|^(torch|transformers)\b')
        mapfile -t needs <<<"$needs"
        "$environment/bin/pip" install -q --disable-pip-version-check "${needs[@]}"
        "$environment/bin/pip" install -q --disable-pip-version-check --no-deps "$wheel"
    else
        "$environment/bin/pip" install -q --disable-pip-version-check "$wheel"
    fi
    installed=$((SECONDS - start))
    (
        cd "$work" && export PYTHONPATH='' PATH="$environment/bin:$PATH"
        qquant --version
        qquant recipe validate "$(qquant recipe init bundled:tiny-qwen1.5 --recipe demo --out mine.yaml >&2 && echo mine.yaml)"
        qquant plan --recipe demo --only gguf-q8_0
        [ -z "${LIGHT:-}" ] || exit 0
        qquant build --recipe mine.yaml --only gguf-q8_0 --set artifacts.gguf-q8_0.solver=ggml --set calibration.samples=4 \
            --set checks.windows=2 --set checks.max_windows=2 --set checks.answer_length=0 --out out
        qquant verify out/tiny-qwen1.5-GGUF --deep
        qquant report out --html report.html
        python -c 'import qquant; assert callable(qquant.load), qquant'
    ) >"$work/log" 2>&1 || { tail -n 20 "$work/log"; echo "wheel: failed on $("$python" -V)"; exit 1; }
    versions=$("$environment/bin/pip" list --format=freeze | grep -E '^(torch|transformers|numpy|pydantic)==' | tr '\n' ' ')
    what=$([ -n "${LIGHT:-}" ] && echo "planned" || echo "built and checked")
    echo "$("$python" -V): ${versions}installed in $installed s, $(du -sm "$environment" | cut -f 1) MB; $what in $((SECONDS - start - installed)) s"
    rm -rf "$environment" "$work/out" "$work/mine.yaml" "$work/report.html"
done
