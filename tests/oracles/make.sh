#!/usr/bin/env bash
# make.sh [NAME...]: build the side environments .oracles/NAME (default: all), one virtual environment a tool.
#
# NAME.txt pins every package, and packages are installed without their dependencies: several tools ask for versions
# that do not work together, and the pins are the set that was seen to work (README.md has the reasons). Only torch,
# whose own dependencies differ between its CPU and CUDA builds, is installed with them first.
# An environment carries a stamp with the hash of its pins and interpreter; while that matches, nothing is done.
# `llama` also gets llama.cpp's converter and two programs (llama-tools.sh).
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
root=$(cd ../.. && pwd)/.oracles
tools() { [ "$1" != llama ] || ./llama-tools.sh "$root/llama" "$(sed -n 's/^llama_cpp_python==//p' llama.txt)"; }
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(llama transformers auto-gptq auto-awq autoround llmcompressor vllm)

fingerprint() { { "$python" -VV; cat "$1.txt"; } | sha256sum | cut -d ' ' -f 1; }

# The two settings below concern llama-cpp-python, which is compiled: all cores, and no multimodal library.
install() {
    local dir=$root/$1 pins=$1.txt pip torch
    pip=("$dir/bin/python" -m pip install -q --disable-pip-version-check)
    torch=$(grep -E '^torch==' "$pins" || true)
    rm -rf "$dir" &&
        "$python" -m venv "$dir" &&
        { [ -z "$torch" ] || "${pip[@]}" "$torch"; } &&
        CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=$(getconf _NPROCESSORS_ONLN) \
            nice -n 5 "${pip[@]}" --no-deps -r "$pins"
}

for name in "${names[@]}"; do
    [ -f "$name.txt" ] || { echo "oracles: no $name.txt among the pins in $PWD" >&2; exit 2; }
done
mkdir -p "$root"
failed=()
for name in "${names[@]}"; do
    stamp=$root/$name/.stamp
    wanted=$(fingerprint "$name")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        tools "$name"
        continue
    fi
    start=$SECONDS
    echo "oracles: building $name (log: .oracles/$name.log)"
    if (install "$name" && tools "$name") >"$root/$name.log" 2>&1; then
        echo "$wanted" >"$stamp"
        echo "oracles: $name ready, $(du -sm "$root/$name" | cut -f 1) MB in $((SECONDS - start)) s"
    else
        tail -n 15 "$root/$name.log" >&2
        failed+=("$name")
    fi
done
[ ${#failed[@]} -eq 0 ] || { echo "oracles: failed: ${failed[*]}" >&2; exit 1; }
