"""Damage of one kind done to a model, and whether `checks.profile: release` calls it by its name.

    python -m tests.bench.damage build CHECKPOINT WORK [--only healthy ...] [--samples 96] [--length 256] [--effort fast] [--formats gptq-int4 awq gguf-q4_k_m]
    python -m tests.bench.damage check CHECKPOINT WORK [--only healthy ...] [--format awq]                   the whole profile, as `qquant check` reads it
    python -m tests.bench.damage compare CHECKPOINT WORK                                                     slices that `check` read: times English, and of rounding's times English
    python -m tests.bench.damage slices CHECKPOINT WORK [--only healthy ...] [--windows 6] [--positions N]   few windows a slice, no questions

`build` leaves artifacts of 4 bits (one GPTQ folder) of each of CASES in WORK, all with the calibration of `qwen1.5-chat`; `check` also says how long each
part of the profile took:

    healthy      as it should be
    theta        that with a rope_theta that is 1 % larger (`--theta 1.01`)
    no-LANGUAGE  no sample of the calibration has a letter of that script
    no-tools     no sample of the calibration is a tool transcript
    rounded      rounded to nearest
    hurt-KIND    that of weights which are off where texts of KIND drive them and others do not (`hurt`)

W x of a linear W [N, K] on tokens x of KIND has the mean energy tr(W H W'), H their second moment and B that of all other texts. With H v = l B v,
the largest l first, B-orthonormal columns V [K, DIRECTIONS] and independent normal numbers R [N, DIRECTIONS],

    W + s R V'        an error of N s^2 sum(l) on texts of KIND and of N s^2 DIRECTIONS on the others; s makes the first `SHARE` of the energy
"""

import argparse
import gzip
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline, recipe
from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.calibration.slices import KINDS, LANGUAGES, LENGTH, Sliced, sliced
from qquant.checks import slices
from qquant.families.decoder import embed, source_block
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.recipe.limits import WORST_SLICE
from qquant.resources import data_dir
from qquant.source.checkpoint import Checkpoint

SCRIPTS = {"thai": "[\u0e00-\u0e7f]", "arabic": "[\u0600-\u06ff]"}
CASES = ("healthy", "theta", "rounded", "hurt-thai", "hurt-arabic", "hurt-tools", "no-thai", "no-arabic", "no-tools")
OWN = {"thai": ("docs-th",), "arabic": ("docs-ar",), "tools": ("tools",)}  # the corpora of a kind
DIRECTIONS, SHARE, RIDGE = 8, 0.1, 0.1
ROWS = 24  # of a corpus of the kind; of each of the others, READ
READ = 4
RECIPE = """
version: 1
name: damage
effort: {effort}
calibration: {{sources: {sources}, samples: {samples}, length: {length}, default_system_share: 0.25}}
checks: {{windows: 2, length: 64, answer_length: 0}}
artifacts:
"""
ARTIFACTS = {
    "gptq-int4": "format: gptq, bits: 4",
    "awq": "format: awq, bits: 4",
    "gguf-q4_k_m": "format: gguf, type: q4_k_m",
}
PLACES = {"gptq-int4": "*/config.json", "awq": "*AWQ*/config.json", "gguf-q4_k_m": "*GGUF*/*.gguf"}  # the first of them


def corpus(name):
    """(kind, documents) of a bundled corpus; of a text its paragraphs."""
    folder = data_dir("calibration") / "corpora"
    if (folder / f"{name}.jsonl").exists():
        return "chat", (folder / f"{name}.jsonl").read_text().splitlines()
    return "text", gzip.decompress((folder / f"{name}.txt.gz").read_bytes()).decode().split("\n\n")


def sources(work, case):
    """The sources of `qwen1.5-chat` for a case: bundled, or what is left of them in files below WORK."""
    left = []
    for source in recipe.load("qwen1.5-chat").calibration.sources:
        entry = {"bundled": source.bundled, "kind": source.kind, "weight": source.weight}
        if case == "no-tools" and source.bundled in OWN["tools"]:
            continue
        if case.removeprefix("no-") in SCRIPTS:
            kind, documents = corpus(source.bundled)
            script = re.compile(SCRIPTS[case.removeprefix("no-")])
            # JSON may spell letters by their numbers
            kept = [
                one
                for one in documents
                if not script.search(json.dumps(json.loads(one), ensure_ascii=False) if kind == "chat" else one)
            ]
            if len(kept) < len(documents) / 2:
                continue
            if len(kept) < len(documents):
                file = work / "texts" / case / f"{source.bundled}.{'jsonl' if kind == 'chat' else 'txt'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(("\n" if kind == "chat" else "\n\n").join(kept))
                entry = {"path": str(file), "kind": source.kind, "weight": source.weight}
        left.append(entry)
    return left


def windows(tokenizer, names, rows, length):
    """Up to `rows` windows int64 [n, length] of each corpus."""
    found = []
    for name in names:
        kind, documents = corpus(name)
        if kind == "chat":
            documents = [tokenizer.render(json.loads(one)["messages"]) for one in documents]
        ids = np.array(tokenizer.encode("\n\n".join(documents)), np.int64)
        there = len(ids) // length
        found += [
            ids[at * length : (at + 1) * length] for at in np.linspace(0, there - 1, min(rows, there)).astype(int)
        ]
    return torch.from_numpy(np.stack(found))


def moments(checkpoint, ids, device):
    """Mean x x' of the input of every stage, float64 [K, K] by (layer, stage)."""
    states = embed(checkpoint, ids.flatten(), torch.float32).to(device).view(*ids.shape, -1)
    found = {}
    for layer in range(checkpoint.config.layers):

        def observe(stage, x, layer=layer):
            rows = x.flatten(0, -2)
            found[layer, stage] = (rows.T @ rows).double().cpu() / len(rows)

        states = source_block(checkpoint, layer, torch.float32, device).forward(states, observe)
    return found


def directions(own, others):
    """(V [K, DIRECTIONS], what each has on the texts of the kind), float64: it has 1 on the others."""
    ridge = RIDGE * float(others.diagonal().mean()) * torch.eye(len(others), dtype=torch.float64)
    root = torch.linalg.cholesky(others + ridge)
    half = torch.linalg.solve_triangular(root, own, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    return torch.linalg.solve_triangular(root.T, vectors[:, -DIRECTIONS:], upper=True), values[-DIRECTIONS:]


def hurt(checkpoint, kind, folder, device):
    """A copy of the checkpoint in `folder` whose linears are off on texts of `kind`."""
    tokenizer = Tokenizer.open(checkpoint.path)
    names = {source.bundled for source in recipe.load("qwen1.5-chat").calibration.sources}
    apart = sorted(names - set(OWN[kind]) - {"rag", "chat-multi"})
    own = moments(checkpoint, windows(tokenizer, OWN[kind], ROWS, 256), device)
    others = moments(checkpoint, windows(tokenizer, apart, READ, 256), device)
    shutil.copytree(checkpoint.path, folder)
    (file,) = folder.glob("*.safetensors")
    tensors, draw = load_file(file), torch.Generator().manual_seed(0)
    shares, sizes = [], []
    for layer in range(checkpoint.config.layers):
        for stage in checkpoint.family.stages:
            v, values = directions(own[layer, stage.name], others[layer, stage.name])
            for linear in stage.linears:
                name = f"{checkpoint.family.block.format(layer)}{linear}.weight"
                weight = tensors[name].double()
                r = torch.randn(len(weight), DIRECTIONS, dtype=torch.float64, generator=draw)
                energy = float(((weight @ own[layer, stage.name]) * weight).sum())
                error = (SHARE * energy / (len(weight) * float(values.sum()))) ** 0.5 * r @ v.T
                shares.append(
                    float(((error @ others[layer, stage.name]) * error).sum())
                    / float(((weight @ others[layer, stage.name]) * weight).sum())
                )
                sizes.append(float(error.norm() / weight.norm()))
                tensors[name] = (weight + error).to(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    print(
        f"hurt-{kind}: {SHARE:.1%} of the energy of outputs there, {np.mean(shares):.2%} elsewhere; weights are {np.mean(sizes):.1%} off, {max(sizes):.1%} at most"
    )


def build(options):
    """An artifact of every case that is not there."""
    device = torch.device(options.device)
    for case in options.only:
        out = options.work / case
        if (out / "report.json").exists() or (out / "model").exists():
            continue
        if case == "theta":
            shutil.copytree(artifact(options.work, "healthy"), out / "model")
            config = json.loads((out / "model" / "config.json").read_text())
            for place in (config, config.get("rope_parameters") or {}):
                if "rope_theta" in place:
                    place["rope_theta"] *= options.theta
            (out / "model" / "config.json").write_text(json.dumps(config))
            continue
        source = options.checkpoint
        if case.startswith("hurt-"):
            source = options.work / "hurt" / case
            if not source.exists():
                hurt(Checkpoint.open(options.checkpoint), case.removeprefix("hurt-"), source, device)
        text = RECIPE.format(
            sources=json.dumps(sources(options.work, case)),
            samples=options.samples,
            length=options.length,
            effort=options.effort,
        )
        for name in options.formats:
            rounded = case.startswith(("hurt-", "rounded"))
            solver = "solver: rtn, " if rounded else "solver: gptq, " if name.startswith("gguf") else ""
            text += f"  - {{name: {name}, {ARTIFACTS[name]}, {solver}gates: {{defaults: false}}}}\n"
        (options.work / f"{case}.yaml").write_text(text)
        loaded, checkpoint = recipe.load(options.work / f"{case}.yaml"), Checkpoint.open(source)
        pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), out, device, Quiet())
        print(f"{case}: built", flush=True)


def artifact(work, case, name="gptq-int4"):
    """The folder or file of a case's artifact."""
    found = sorted((work / case).glob(PLACES[name]))
    if name == "gptq-int4":
        found = [one for one in found if "AWQ" not in one.parent.name]
    return found[0] if name.startswith("gguf") else found[0].parent


def fewer(text, options):
    """The first windows of some slices, and the beginnings of the long documents."""
    starts = np.cumsum([0, *(one.windows for one in text.slices)])
    wanted = {
        one: start + np.arange(min(options.windows, one.windows))
        for one, start in zip(text.slices, starts, strict=False)
        if one.name in (options.slices or [one.name])
    }
    short = tuple(replace(one, windows=len(rows)) for one, rows in wanted.items())
    documents = options.documents if options.positions > LENGTH else 0
    return Sliced(short, text.short[np.concatenate(list(wanted.values()))], text.long[:documents, : options.positions])


def read_slices(options):
    """Few windows of every slice, judged by their gate."""
    checkpoint, device = Checkpoint.open(options.checkpoint), torch.device(options.device)
    tokenizer = Tokenizer.open(checkpoint.path)
    text = fewer(sliced(tokenizer, checkpoint.config.positions), options)
    weights = {case: open_weights(artifact(options.work, case, options.format), device) for case in options.only}
    found = slices.readings(checkpoint, weights, text, tokenizer, device, Quiet())
    for case, readings in found.items():
        rows, verdict = slices.judge(readings, WORST_SLICE)
        print(f"\n{case}: {verdict.outcome if verdict else 'no gate'} {'; '.join(verdict.reasons) if verdict else ''}")
        table(rows)


def table(rows):
    """Every slice, one a line."""
    for row in rows:
        times = f"{row.relative.value:6.2f} [{row.relative.low:.2f}, {row.relative.high:.2f}]" if row.relative else ""
        print(
            f"  {row.name:28} {row.windows:3} {row.kl_divergence.value:9.5f} {row.perplexity_baseline:8.1f} {row.bits / max(row.frequencies, 1e-9):5.2f} {times:24} {row.standing}"
        )


class Clock(Quiet):
    """When each phase was heard of first and last."""

    def __init__(self):
        self.start, self.phases = time.monotonic(), {}

    def advance(self, phase, done, of):
        """Note the time."""
        now = time.monotonic() - self.start
        self.phases[phase] = self.phases.get(phase, (now, now))[0], now


def read_all(options):
    """The whole profile."""
    checkpoint, device = Checkpoint.open(options.checkpoint), torch.device(options.device)
    paths = {str(artifact(options.work, case, options.format)): f"{case}, {options.format}" for case in options.only}
    checks = Checks(profile=options.profile, windows=40, answer_length=0)
    out, clock = options.work / f"report-{'-'.join([*options.only, options.format])}", Clock()
    report = pipeline.check(list(map(Path, paths)), checkpoint, checks, Gates(), device, clock, out)
    print(
        "seconds, from the start to the last step: "
        + "; ".join(f"{one} {a:.1f} to {b:.1f}" for one, (a, b) in clock.phases.items())
    )
    for row in report.artifacts:
        print(f"\n{paths[row.path]}: {row.verdict.outcome}\n" + "\n".join(f"  {line}" for line in row.verdict.reasons))
        table(row.slices)
        for one in row.behaviour:
            kl = f"{one.kl_divergence.value:.4f}" if one.kl_divergence else ""
            print(
                f"  {one.name:28} {one.questions:3} right {one.right_baseline:3} -> {one.right:3} {kl:7} {one.standing}"
            )


def compare(options):
    """Mean KL divergence of every slice over English, and the same over what rounding to nearest has there, of all reports in WORK."""
    losses = {}
    for file in sorted(options.work.glob("report-*/report.json")):
        for row in json.loads(file.read_text())["artifacts"]:
            kl = {
                one["name"]: one["kl_divergence"]["value"]
                for one in row.get("slices", ())
                if one["group"] != "position"
            }
            if kl:
                losses[file.parent.name.removeprefix("report-")] = kl
    reference = losses.get("rounded-gptq-int4")
    for name, kl in losses.items():
        print(f"\n{name}: English {kl['English']:.5f}")
        for one, value in kl.items():
            times = value / kl["English"]
            of_rounding = f"{times * reference['English'] / reference[one]:6.2f}" if reference else ""
            print(f"  {one:28} {value:9.5f} {times:6.2f} {of_rounding}")


def main():
    """Build, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "slices", "check", "compare"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--profile", choices=["release", "default"], default="release")
    parser.add_argument(
        "--formats", nargs="+", choices=ARTIFACTS, default=["gptq-int4"], help="to build; theta has the first"
    )
    parser.add_argument("--format", choices=ARTIFACTS, default="gptq-int4", help="to check")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--slices", nargs="+", choices=[*LANGUAGES, *KINDS], help="English among them; default: all")
    parser.add_argument("--positions", type=int, default=16_384, help="of a long document; 0: none is read")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--theta", type=float, default=1.01, help="what rope_theta is multiplied by")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    {"build": build, "slices": read_slices, "check": read_all, "compare": compare}[options.command](options)


if __name__ == "__main__":
    main()
