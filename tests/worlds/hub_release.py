"""A small release of random bytes, how it is published to the stand-in of the hub, and what has to be there then."""

import hashlib
import json
import random

from huggingface_hub import HfApi

from qquant.artifact.manifest import digest_of, records
from qquant.release.hub import HuggingFace, Request
from qquant.release.repository import complete, read_release
from tests.worlds.hub_server import TOKEN

GPTQ, GGUF = "Qwen1.5-Test-Chat-GPTQ-Int4", "Qwen1.5-Test-Chat-GGUF"
CONTENTS = {
    GPTQ: {"gptq-int4": ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]},
    GGUF: {"q8_0": ["qwen1_5-test-chat-q8_0.gguf"], "q4_0": ["qwen1_5-test-chat-q4_0.gguf"]},
}


def write_build(folder, seed=0, contents=CONTENTS, outcomes=(), size=50_000):
    """The output folder of a build, small, with random bytes; `outcomes` override the verdict of artifacts."""
    draw = random.Random(seed)
    rows = []
    for repo, artifacts in contents.items():
        (folder / repo).mkdir(parents=True)
        manifest, here = {"schema": "qquant-manifest-1", "artifacts": {}}, []
        for name, files in artifacts.items():
            facts = {}
            for file in files:
                content = b'{"model_type": "qwen2"}' if file.endswith(".json") else draw.randbytes(size)
                (folder / repo / file).write_bytes(content)
                facts[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["artifacts"][name] = {
                "key": "0", "format": "gguf" if "GGUF" in repo else "gptq", "files": facts, "layers": [],
                "recipe": {"name": "test", "artifacts": [], "calibration": {"sources": [{"kind": "chat"}]}}, "inputs": {"checkpoint": "c0ffee", "qquant": "0.1.0"},
            }  # fmt: skip
            here.append(
                {
                    "name": name, "path": str(folder / repo), "size": sum(fact["bytes"] for fact in facts.values()),
                    "bits_per_weight": 4.5, "perplexity": 10.25 + seed, "perplexity_ratio": 1.0123, "kl_divergence": 0.0213, "kl_99": 0.2,
                    "top1_agreement": 0.95125, "sha256": digest_of({name: fact["sha256"] for name, fact in facts.items()}),
                    "verdict": dict(outcomes).get(name, {"outcome": "pass", "reasons": []}),
                }
            )  # fmt: skip
        (folder / repo / "qquant-manifest.json").write_text(json.dumps(manifest))
        rows += [row | {"record": records(folder / repo)[row["name"]]} for row in here]
    report = {
        "schema": "qquant-report-1", "model": "Qwen1.5-Test-Chat", "recipe": "test", "verdict": "pass",
        "baseline": {"bits_per_weight": 16.0, "perplexity": 10.125}, "artifacts": rows,
        "conditions": {
            "checkpoint": "c0ffee", "text": {"name": "bundled:wikitext-2-test", "windows": 40, "length": 512},
        },
        "calibration": {"samples": 8, "tokens": 384, "sha256": "ab" * 32, "sources": []},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    source = {
        "schema": "qquant-source-1", "model": "Qwen1.5-Test-Chat", "base_model": None, "revision": None, "chat": True,
        "card": {"license": "mit", "tags": ["chat"]}, "tensor_parallel": {"gptq-int4": {"vllm": [1, 2], "sglang": [1]}}, "licence_file": None,
    }  # fmt: skip
    (folder / "source.json").write_text(json.dumps(source))
    return folder


class Waits(list):
    """Records the pauses instead of taking them."""

    def __call__(self, seconds):
        self.append(seconds)


def repositories(folder, **facts):
    return [complete(repository, **facts) for repository in read_release(folder).repositories]


def publish(hub, folder, waits=None, said=None, **request):
    destination = HuggingFace(HfApi(hub.url, TOKEN), (said or []).append, waits or Waits())
    return destination.publish(repositories(folder), Request(**{"namespace": "org", "tag": "v1", **request}))


def expected(folder):
    return {
        f"org/{repository.name}": {name: payload.read() for name, payload in repository.files.items()}
        for repository in repositories(folder)
    }


def require_whole(hub, *folders):
    """Every tree that main ever showed was empty or exactly one release."""
    releases = [expected(folder) for folder in folders]
    for name, trees in hub.history.items():
        for tree in trees:
            shown = {path: entry.content for path, entry in tree.items() if path != ".gitattributes"}
            assert shown == {} or any(shown == release[name] for release in releases), sorted(shown)
