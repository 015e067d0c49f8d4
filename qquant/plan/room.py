"""What gives way where memory is short: rules by bytes alone, which a build obeys and a plan foresees. None of them changes a number, but for questions.

hidden states    of all streams, on the device, or on the host, from where each sample comes and goes
passages         what a sample holds between two stages of a block on a stream of its own: kept, or made again for every stage
questions        keys and values of answers that a model gives at once: of as many questions as have room, which moves the last bits of logits
windows          hidden states of a check, of the checkpoint and all artifacts at once: of all windows of a text, or of as many as have room

A build finds in between that memory is shorter than was thought: then more gives way (`qquant.solve.stream`).
"""

from __future__ import annotations

from qquant.families import Family, ModelConfig

STATES = 0.3  # of the free memory that hidden states may take
PASSAGES = 0.3  # of what is free beside them
CHECK = 0.25  # of the free memory that hidden states of a check may take
ANSWERS = 0.3  # of the free memory that keys and values of answers may take
HELD = 2  # times the hidden states of windows: what they are, and what is made of them


def states_stay(nbytes: int, free: int) -> bool:
    """Whether hidden states stay on the device."""
    return nbytes <= STATES * free


def passages_bytes(family: Family, config: ModelConfig, tokens: int, itemsize: int, onward: int) -> int:
    """Bytes that passages hold between two stages: two hidden states, the widest input, and an output for each of the `onward` ones, which go to the end."""
    widest = max(columns for layer in range(config.layers) for columns in family.inputs(config, layer).values())
    return tokens * itemsize * (widest + (2 + onward) * config.hidden)


def passages_stay(nbytes: int, free: int) -> bool:
    """Whether every sample keeps what it holds."""
    return nbytes <= PASSAGES * free


def checked_bytes(tokens: int, models: int, hidden: int, free: int) -> int:
    """Bytes of hidden states that a check of `models` on `tokens` holds at once."""
    return min(HELD * 4 * tokens * models * hidden, int(CHECK * free))


def answered_together(config: ModelConfig, positions: int, itemsize: int, most: int, free: int) -> int:
    """How many prompts with their answers, `positions` tokens each, are answered at once: at least one, and not more than `most`."""
    row = 2 * itemsize * config.layers * config.kv_heads * config.head_dim * positions
    return max(1, min(most, int(ANSWERS * free / row)))
