#!/usr/bin/env bash
# llama-tools.sh DIR SDIST_VERSION: llama.cpp's converter and two of its programs, of the sources in llama-cpp-python's sdist.
#
#     DIR/tools/convert_hf_to_gguf.py, conversion/, gguf-py/    as they are
#     DIR/tools/llama-quantize, llama-gguf-split                compiled against the libraries of DIR, which has no programs
#
# Half a minute. Nothing is done while the stamp matches.
set -euo pipefail
dir=$1 version=$2 tools=$1/tools
[ "$(cat "$tools/.stamp" 2>/dev/null)" = "$version" ] && exit 0
rm -rf "$tools"
mkdir -p "$tools/source"
"$dir/bin/python" -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    -d "$tools" "llama-cpp-python==$version"
root=llama_cpp_python-$version/vendor/llama.cpp
tar xzf "$tools/llama_cpp_python-$version.tar.gz" -C "$tools/source" --strip-components=3 \
    "$root"/{convert_hf_to_gguf.py,conversion,gguf-py,common,include,ggml/include,tools,vendor}
rm "$tools/llama_cpp_python-$version.tar.gz"
mv "$tools"/source/{convert_hf_to_gguf.py,conversion,gguf-py} "$tools"
source=$tools/source lib=$(cd "$dir"/lib/python3*/site-packages/llama_cpp/lib && pwd)
sed 's/@LLAMA_BUILD_NUMBER@/0/;s/@[A-Z_]*@/qquant oracle/' "$source/common/build-info.cpp.in" >"$source/build-info.cpp"
compile() {
    local out=$1
    shift
    nice -n 5 "${CXX:-g++}" -O0 -std=c++17 -ffunction-sections -Wl,--gc-sections -w \
        -I"$source"/{include,ggml/include,common,vendor} "$@" "$source/build-info.cpp" \
        -L"$lib" -lllama -lggml -lggml-base -lpthread -Wl,-rpath,"$lib" -o "$tools/$out"
}
compile llama-gguf-split "$source"/tools/gguf-split/*.cpp
compile llama-quantize "$source"/tools/quantize/*.cpp "$source"/common/{imatrix-loader,log,common,json,unicode,console}.cpp
rm -rf "$source"
echo "$version" >"$tools/.stamp"
