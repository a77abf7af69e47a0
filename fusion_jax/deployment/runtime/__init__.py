"""What runs an exported model where nothing of fusion_jax is installed.

`export` copies this folder into every artifact. Nothing here imports the rest of fusion_jax; it
needs jax and numpy, and for reading inputs tokenizers, jinja2, pillow, soundfile and soxr.
"""
