"""Local copies of the data sets of `qquant tasks --suite qwen1.5` with a few invented questions, in the places, splits and columns of the hub's.

DIR/OWNER/NAME/README.md                        which files each configuration and split has, as the hub's pages say it
DIR/OWNER/NAME/CONFIGURATION/SPLIT.jsonl        the questions
"""

import json
from pathlib import Path

import yaml

WORDS = ["river", "stone", "north", "seven", "lamp", "cold", "green", "paper"]
SHOWN = ("train", "dev")  # splits that examples come from


class _Plain(yaml.SafeLoader):
    """YAML whose functions are nothing."""


_Plain.add_constructor("!function", lambda loader, node: None)


def definitions(folder):
    """Every task that lm-eval defines below a folder, as a dictionary."""
    for path in sorted(Path(folder).rglob("*.yaml")):
        found = _read(path)
        if isinstance(found.get("task"), str):
            yield found


def _read(path):
    text = path.read_text(encoding="utf-8")
    content = yaml.load(text, _Plain)
    included = content.pop("include", None)
    return {**_read(path.parent / included), **content} if included else content


def write(folder, tasks, questions=8):
    """Copies of all data sets that the definitions `tasks` read."""
    splits = {}
    for task in tasks:
        keys = ("test_split", "validation_split", "fewshot_split", "training_split")
        mine = splits.setdefault(task["dataset_path"], {}).setdefault(task.get("dataset_name") or "default", set())
        mine |= {task[key] for key in keys if task.get(key)}
    for data, configurations in splits.items():
        pages = []
        for name, those in configurations.items():
            files = []
            for split in sorted(those):
                path = folder / data / name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                first = 100 if split in SHOWN else 0
                rows = [_row(data, number) for number in range(first, first + questions)]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                files.append({"split": split, "path": f"{name}/{split}.jsonl"})
            pages.append({"config_name": name, "data_files": files})
        (folder / data / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': pages})}---\n")


def _row(data, number):
    question, choices = f"What comes after {WORDS[number % 8]} in list {number}?", [WORDS[(number + k) % 8] for k in range(4)]  # fmt: skip
    letters, letter = dict(zip("ABCD", choices, strict=True)), "ABCD"[number % 4]
    pens = f"Ann has {number} pens and buys 3. How many?"
    match data:
        case "cais/mmlu":
            return {"question": question, "subject": "words", "choices": choices, "answer": number % 4}
        case "ceval/ceval-exam":
            return {"id": number, "question": question, **letters, "answer": letter, "explanation": ""}
        case "haonan-li/cmmlu":
            return {"Question": question, **letters, "Answer": letter}
        case "alexandrainst/m_mmlu":
            options = {f"option_{key.lower()}": value for key, value in letters.items()}
            return {"id": str(number), "instruction": question, **options, "answer": letter}
        case "openai/gsm8k":
            return {"question": pens, "answer": f"{number} + 3 = {number + 3}\n#### {number + 3}"}
        case "juletxara/mgsm":
            answer = f"{number} + 3 = {number + 3}."
            return {"question": pens, "answer": answer, "answer_number": number + 3, "equation_solution": ""}
        case "EleutherAI/hendrycks_math":
            solution = f"It is $\\boxed{{{number + 3}}}$."
            return {"problem": f"What is ${number}+3$?", "solution": solution, "level": "Level 1", "type": "Algebra"}
        case "SaylorTwift/bbh":
            return {"input": f"not True and {number} is", "target": "False"}
        case "facebook/belebele":
            answers = {f"mc_answer{key}": choice for key, choice in enumerate(choices, 1)}
            right = {"question": question, "correct_answer_num": str(number % 4 + 1)}
            return {"flores_passage": f"The {' '.join(WORDS)}.", **right, **answers}
    raise AssertionError(data)
