#!/usr/bin/env bash
# wheel.sh [PYTHON...]: what a user gets who installs the wheel, for each interpreter (default: python3) in a fresh environment that is removed again.
#
# The wheel is built from this tree; pip takes what pyproject.toml asks for. Then, outside the repository: the commands that need no torch,
# and a build of one file of the bundled checkpoint with its check. One line a Python: versions, seconds, megabytes.
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
    "$environment/bin/pip" install -q --disable-pip-version-check "$wheel"
    installed=$((SECONDS - start))
    (
        cd "$work" && export PYTHONPATH='' PATH="$environment/bin:$PATH"
        qquant --version
        qquant recipe validate "$(qquant recipe init bundled:tiny-qwen1.5 --recipe demo --out mine.yaml >&2 && echo mine.yaml)"
        qquant plan --recipe demo --only gguf-q8_0
        qquant build --recipe mine.yaml --only gguf-q8_0 --effort fast --set checks.windows=4 --set checks.answer_length=0 --out out
        qquant verify out/tiny-qwen1.5-GGUF --deep
        qquant report out --html report.html
        python -c 'import qquant; assert callable(qquant.load), qquant'
    ) >"$work/log" 2>&1 || { tail -n 20 "$work/log"; echo "wheel: failed on $("$python" -V)"; exit 1; }
    versions=$("$environment/bin/pip" list --format=freeze | grep -E '^(torch|transformers|numpy)==' | tr '\n' ' ')
    echo "$("$python" -V): ${versions}installed in $installed s, $(du -sm "$environment" | cut -f 1) MB; built and checked in $((SECONDS - start - installed)) s"
    rm -rf "$environment" "$work/out" "$work/mine.yaml" "$work/report.html"
done
