"""qquant: quantize a Qwen1.5 checkpoint once into GPTQ, AWQ and GGUF, and check every artifact against it."""

__version__ = "0.1.0"
