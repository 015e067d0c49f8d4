"""What a build will write and take, before any work: bytes, memory, tensor-parallel sizes. Needs no torch."""
