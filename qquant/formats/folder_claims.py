"""What the files around the weights of a model folder say, key by key, against the checkpoint's: our writer copies them byte for byte.

    config.json             READ are the keys for which transformers, vLLM or SGLang compute something else, with the value that is
                            taken where a key is absent; the rope is compared as one, however it is spelled
    generation_config.json  every setting of how tokens are drawn and where answers end
    tokenizer.json          the model, added tokens and all steps before and after; where a step differs, ids of a sample decide
    tokenizer_config.json   the keys for which transformers makes another tokenizer; the chat template
    others                  vocab.json, merges.txt, special_tokens_map.json, added_tokens.json and further chat templates, which some
                            tokenizers read; where the checkpoint has no such file, what it says is held against tokenizer.json

Other tools write these files again, with what their version of transformers adds. HARMLESS says which keys change no answer, and why; a
key that is in no table is a warning. Left out: a file that is missing altogether, which is said once for each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qquant.calibration.tokenizer import Tokenizer
from qquant.formats.claims import Claims, claims, differs, shown
from qquant.source.checkpoint import Checkpoint
from qquant.source.untrusted import read_json, read_text, require_regular
from qquant.source.vocabulary import read as read_vocabulary

IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
ENDS, DRAWN = "answers end or begin with other tokens", "answers are drawn otherwise"
HEADS, READS = "attention is cut into other heads", "the same text gets other tokens"
NUMBERS = "it does not load, or computes something else"
READ: dict[str, dict[str, tuple[Any, str]]] = {  # file -> key -> (what is taken without it, what follows)
    "config.json": {
        "architectures": (None, "it is loaded as another kind of model"),
        "model_type": (None, "it is loaded as another kind of model"),
        "hidden_act": ("silu", "another activation is computed"),
        "hidden_size": (4096, NUMBERS),
        "intermediate_size": (22016, NUMBERS),
        "num_hidden_layers": (32, "blocks are left out, or it does not load"),
        "num_attention_heads": (32, HEADS),
        "num_key_value_heads": (32, HEADS),
        "head_dim": (None, HEADS),
        "vocab_size": (151936, NUMBERS),
        "rms_norm_eps": (1e-6, "every norm gives other numbers"),
        "max_position_embeddings": (32768, "a runtime cuts prompts there, or lets them run beyond what the model was made for"),
        "tie_word_embeddings": (False, "the head is another matrix"),
        "use_sliding_window": (False, "attention sees less"),
        "layer_types": (None, "attention sees less"),
        "is_causal": (True, "attention sees what comes after"),
        "partial_rotary_factor": (1.0, "positions are rotated otherwise"),
        "dual_chunk_attention_config": (None, "attention is another one"),
        "compression_config": (None, "it is loaded as quantized otherwise"),
        "eos_token_id": (None, ENDS),
        "bos_token_id": (None, ENDS),
        "pad_token_id": (None, ENDS),
    },
    "generation_config.json": {
        **dict.fromkeys(IDS, (None, ENDS)),
        **{
            key: (default, DRAWN)
            for key, default in {
                "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
                "eta_cutoff": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
                "length_penalty": 1.0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "early_stopping": False,
                "penalty_alpha": None, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
                "forced_bos_token_id": None, "forced_eos_token_id": None, "max_length": 20, "max_new_tokens": None, "min_length": 0,
                "min_new_tokens": None, "max_time": None, "stop_strings": None, "sequence_bias": None, "guidance_scale": None,
                "exponential_decay_length_penalty": None, "renormalize_logits": False, "token_healing": False, "dola_layers": None,
                "watermarking_config": None, "prompt_lookup_num_tokens": None, "remove_invalid_values": False, "num_return_sequences": 1,
            }.items()
        },
    },
    "tokenizer_config.json": {
        "tokenizer_class": (None, "another kind of tokenizer is made"),
        "bos_token": (None, "chat templates and prompts get another token"),
        "eos_token": (None, ENDS),
        "pad_token": (None, "batches are padded with another token"),
        "unk_token": (None, READS),
        "add_bos_token": (False, "a token is put before every prompt, or is left out"),
        "add_eos_token": (False, "a token is put after every prompt, or is left out"),
        "add_prefix_space": (False, READS),
        "split_special_tokens": (False, READS),
        "clean_up_tokenization_spaces": (False, "blanks are taken out of answers"),
        "additional_special_tokens": ([], "other tokens are left out of answers"),
        "added_tokens_decoder": ({}, READS),
        "errors": ("replace", "bytes that are no text are shown otherwise"),
        "fast_tokenizer_files": (None, f"another file is read, and {READS}"),
    },
}  # fmt: skip
HARMLESS: dict[str, dict[str, str]] = {
    "config.json": {
        "quantization_config": "the format reads it, and compares it apart",
        "rope_theta": "compared as one rope",
        "rope_parameters": "compared as one rope",
        "rope_scaling": "compared as one rope",
        "sliding_window": "read only with use_sliding_window, which is refused",
        "max_window_layers": "read only with use_sliding_window, which is refused",
        "transformers_version": "tells what wrote the file",
        "_name_or_path": "tells what it was made from",
        "use_cache": "a cache of keys and values changes speed only",
        "initializer_range": "of training",
        "attention_dropout": "of training",
        "_attn_implementation_autoset": "a note of transformers to itself",
        "output_attentions": "asks for more outputs, and changes none",
        "output_hidden_states": "asks for more outputs, and changes none",
        "id2label": "of classifiers",
        "label2id": "of classifiers",
        "problem_type": "of classifiers",
    },
    "generation_config.json": {
        "transformers_version": "tells what wrote the file",
        "_from_model_config": "tells where it is from",
        "use_cache": "a cache of keys and values changes speed only",
    },
    "tokenizer_config.json": {
        "chat_template": "compared with the checkpoint's, wherever it stands",
        "name_or_path": "tells what it was made from",
        "special_tokens_map_file": "a path of the machine that wrote it",
        "tokenizer_file": "a path of the machine that wrote it",
    },
}
"""Keys that change no answer, and why."""
WARNED = {  # keys that runtimes read, and a user may want otherwise
    "model_max_length": "longer prompts are refused or cut",
    "extra_special_tokens": "other tokens are left out of answers",
}
ABSENT = {  # files, and what a runtime does without them
    "generation_config.json": "answers are drawn by a runtime's own settings, and end where config.json says",
    "chat_template.jinja": "a runtime writes no chats, or those of a template of its own",
    "tokenizer.json": "a runtime needs a tokenizer from elsewhere",
    "tokenizer_config.json": "the kind of tokenizer and its special tokens are guessed",
}
FLOAT32 = 2e-7  # relative distance of numbers that are one in float32
OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
SLOW = ("vocab.json", "merges.txt")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
SAMPLE = (
    "The 3 quick brown foxes\u2014it's 12:45, isn't it?  \n\n  Cafe\u0301 \u00bd \ufb01ne, na\u00efve \u2126. <|im_end|>",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01 2024\u5e74\u3001\u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "def f(x):\n\treturn x**2 + 0x1F  # 10000000\r\n    if a != b:\n\n\n        pass\u3000\U0001f600\u200d\U0001f680",
    "<|endoftext|><|im_start|>user\nIT'S WE'LL they've 'Tis I\u2019m '' \"\" ``` $$ @@ <<>> /* */ --\n<|im_end|>\n",
)  # fmt: skip


def compare(path: Path, checkpoint: Checkpoint) -> Claims:
    """The claims of the folder `path`, but for its quantization_config.

    Raises:
        InputError: a file of it, or of the checkpoint, is damaged.
    """
    differences = _config(path, checkpoint) + _keys("generation_config.json", *_generation(path, checkpoint))
    differences += claims(
        warnings=[
            f"{file.name}: missing{f'; {ABSENT[file.name]}' if file.name in ABSENT else ''}"
            for file in checkpoint.side_files
            if not (path / file.name).exists()
        ]
    )
    if any(os.path.lexists(path / name) for name in ("tokenizer.json", "vocab.json")):
        differences += _tokenizer(path, checkpoint.path)
    return differences


def _file(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def _config(path: Path, checkpoint: Checkpoint) -> Claims:
    mine, theirs = read_json(path / "config.json"), dict(checkpoint.raw_config)
    differences = _keys("config.json", mine, theirs)
    ropes = rope(mine), rope(theirs)
    if not same(*ropes):
        differences += claims([differs("config.json: rope", *ropes, "every position is rotated otherwise")])
    elif "rope_theta" in theirs and "rope_theta" not in mine and not same(theirs["rope_theta"], 10000.0):
        differences += claims(warnings=["config.json: rope_theta: missing; readers before transformers 5 take 10000"])
    return differences


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding that a config.json asks for, in one spelling."""
    parameters: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
    if config.get("rope_theta") is not None:
        parameters["rope_theta"] = config["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        stated = config.get(key)
        if isinstance(stated, Mapping):
            parameters |= {"rope_type" if name == "type" else name: value for name, value in stated.items()}
    return parameters


def _generation(path: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the artifact's, the checkpoint's); without a file, transformers makes one of the ids in config.json."""
    name = "generation_config.json"
    if not os.path.lexists(path / name):
        return {}, {}
    if os.path.lexists(checkpoint.path / name):
        return read_json(path / name), read_json(checkpoint.path / name)
    return read_json(path / name), {key: checkpoint.raw_config[key] for key in IDS if key in checkpoint.raw_config}


def _keys(file: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Claims:
    """Every key of one file that says something else."""
    read, harmless = READ[file], HARMLESS[file]
    faults, warnings = [], []
    for key in sorted({*mine, *theirs} - harmless.keys()):
        default, consequence = read.get(key, (None, ""))
        if key == "head_dim":
            default = _head_dim(theirs)
        pair = mine.get(key, default), theirs.get(key, default)
        if same(*(_plain(key, value) for value in pair)):
            continue
        if key in ("torch_dtype", "dtype"):
            warnings += _dtype(file, mine, theirs)
        elif key in read:
            faults.append(differs(f"{file}: {key}", *pair, consequence))
        else:
            consequence = WARNED.get(key, "qquant does not know whether a runtime reads it")
            warnings.append(differs(f"{file}: {key}", *pair, consequence))
    return claims(faults, list(dict.fromkeys(warnings)))


def _dtype(file: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """How the dtypes differ, by either spelling of the key; empty: not."""
    stated = [config.get("dtype") or config.get("torch_dtype") for config in (mine, theirs)]
    difference = differs(f"{file}: dtype", stated[0], stated[1], "activations are rounded otherwise")
    return [] if same(*stated) else [difference]


def _head_dim(config: Mapping[str, Any]) -> Any:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _plain(key: str, value: Any) -> Any:
    """A value as it is read: a token by its text, one stop token as a list of one, a list of equal layers as none."""
    if key.endswith("_token") and isinstance(value, Mapping):
        return value.get("content")
    if key == "eos_token_id" and isinstance(value, int):
        return [value]
    if key == "layer_types" and isinstance(value, list) and set(map(str, value)) <= {"full_attention"}:
        return None
    return value


def same(mine: Any, theirs: Any) -> bool:
    """Whether two JSON values are one, as far as float32 tells."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (mine, theirs)]
    if all(numbers):
        return bool(mine == theirs) or math.isclose(mine, theirs, rel_tol=FLOAT32)
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return type(mine) is type(theirs) and bool(mine == theirs)


def left_out(demanded: Iterable[str], quantization: Mapping[str, Any]) -> list[str]:
    """A warning for each key of quantization_config that is not there, though runtimes load nothing without it."""
    return [
        f"quantization_config: {key} is missing; vLLM and SGLang do not load a folder without it"
        for key in demanded
        if key not in quantization
    ]


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def _tokenizer(path: Path, source: Path) -> Claims:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *OTHERS, *SLOW, *_further(path))
    if all(_bytes(path / name) == _bytes(source / name) for name in names):
        return claims()
    mine, theirs = Tokenizer.open(path), Tokenizer.open(source)
    differences = _behaviour(mine, theirs) + _parts(_file(path / "tokenizer.json"), _file(source / "tokenizer.json"))
    settings = [_file(folder / "tokenizer_config.json") for folder in (path, source)]
    if all(settings):
        differences += _keys("tokenizer_config.json", *settings) + _blanks(*settings)
    return (
        differences + _templates(path, source, settings, theirs.template) + _beside(path, source, settings[1], theirs)
    )


def _further(path: Path) -> list[str]:
    """Chat templates beside the one of the model, which transformers takes by their names, as `tool_use` where there are tools."""
    return sorted(str(file.relative_to(path)) for file in path.glob("additional_chat_templates/*.jinja"))


def _templates(path: Path, source: Path, settings: Sequence[Mapping[str, Any]], template: str | None) -> Claims:
    """Templates that stand elsewhere than in chat_template.jinja."""
    faults = [
        f"{name}: is not the checkpoint's; chats are written by it where a runtime asks for one of its name"
        for name in _further(path)
        if _bytes(path / name) != _bytes(source / name)
    ]
    mine, theirs = (config.get("chat_template") for config in settings)
    if mine is not None and mine not in (theirs, template):
        faults.append("tokenizer_config.json: chat_template is not the checkpoint's; some runtimes write chats by it")
    return claims(faults)


def _beside(path: Path, source: Path, settings: Mapping[str, Any], theirs: Tokenizer) -> Claims:
    """Files of which some tokenizers are made; where the checkpoint has none of a name, against what its others say."""
    faults, warnings, vocabulary = [], [], read_vocabulary(source)
    added = {token.content: token.id for token in vocabulary.added}
    merges = [" ".join(pair) for pair in vocabulary.merges]
    implied: dict[str, Mapping[str, Any]] = {
        "special_tokens_map.json": {key: _plain(key, value) for key, value in settings.items()},
        "added_tokens.json": {**vocabulary.tokens, **added},
        "chat_template.json": {"chat_template": theirs.template},
    }
    for name in OTHERS:
        content, stated = _file(path / name), _file(source / name)
        if stated:
            other = bool(content) and not same(content, stated)
        else:
            other = any(not same(_plain(key, value), implied[name].get(key)) for key, value in content.items())
        if other:
            warnings.append(f"{name}: is not the checkpoint's; some versions of transformers read it")
    for name in SLOW:
        if not os.path.lexists(path / name):
            continue
        if os.path.lexists(source / name):
            alike = read_text(path / name) == read_text(source / name)
        elif name == "vocab.json":
            alike = _file(path / name) in (vocabulary.tokens, implied["added_tokens.json"])
        else:
            alike = [line for line in read_text(path / name).split("\n") if line and line[:8] != "#version"] == merges
        if not alike:
            faults.append(f"{name}: is not the checkpoint's; tokenizers that read it give the same text other tokens")
    return claims(faults, warnings)


def _blanks(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Claims:
    """The one setting of tokenizer_config.json whose default changed between versions of transformers."""
    key = "clean_up_tokenization_spaces"
    if key in mine or key not in theirs:
        return claims()
    return claims(
        warnings=[
            f"tokenizer_config.json: {key}: missing; older versions of transformers take blanks out of answers then"
        ]
    )


def _bytes(path: Path) -> bytes | None:
    return require_regular(path).read_bytes() if os.path.lexists(path) else None


def _behaviour(mine: Tokenizer, theirs: Tokenizer) -> Claims:
    """What the two do with a sample, and with every id."""
    faults = []
    alike = mine.size == theirs.size and mine.added == theirs.added and mine.special == theirs.special
    if (
        not alike
        or any(mine.encode(text) != theirs.encode(text) for text in SAMPLE)
        or mine.decode(range(mine.size)) != theirs.decode(range(theirs.size))
    ):
        faults.append(f"tokenizer: is not the checkpoint's; {READS}")
    if mine.template is not None and mine.template != theirs.template:  # none at all is a file that is missing
        faults.append("chat template: is not the checkpoint's")
    if set(mine.eos) != set(theirs.eos):
        faults.append(f"stop tokens: {sorted(mine.eos)}, the checkpoint's are {sorted(theirs.eos)}")
    return claims(faults)


def _parts(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Claims:
    """The pieces of two tokenizer.json; both {} where one is made of parts."""
    if not mine or not theirs:
        return claims()
    models = [_model(content.get("model")) for content in (mine, theirs)]
    added = [sorted(map(shown, content.get("added_tokens") or [])) for content in (mine, theirs)]
    faults, warnings = [], []
    if models[0] != models[1]:
        keys = [key for key in sorted({*models[0], *models[1]}) if models[0].get(key) != models[1].get(key)]
        faults.append(f"tokenizer.json: model: {', '.join(keys)} is not the checkpoint's; {READS}")
    if added[0] != added[1]:
        faults.append(f"tokenizer.json: added_tokens are not the checkpoint's; {READS}")
    for step in STEPS:
        if mine.get(step) != theirs.get(step):
            warnings.append(f"tokenizer.json: {step} is not the checkpoint's; a sample of text gets the same tokens")
    return claims(faults, warnings)


def _model(model: Any) -> dict[str, Any]:
    """The model of a tokenizer without what is as it is where nothing is said, and with merges in one spelling."""
    content = (
        {key: value for key, value in model.items() if value not in (None, False, "")}
        if isinstance(model, dict)
        else {}
    )
    merges: Iterable[Any] = content.get("merges") or ()
    return content | {"merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]}
