"""The tokenizer and the chat template that a GGUF file carries in its metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fusion_jax.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # token types
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = rf"{WORDS}\p{{N}}{{1,3}}{REST}", rf"{WORDS}\p{{N}}{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # how text is cut before merging, by tokenizer.ggml.pre; None: as GPT-2 does
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
}
WHOLE = ("llama3", "llama-v3", "llama-bpe", "tekken")
"""Where a word that is a token is not merged from parts, and, unless said, a text has a start."""


def read_tokenizer(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata.

    Raises:
        UserError: a kind of tokenizer, or a way to cut text before merging, that is not known; a
            damaged one.
    """
    try:
        return _read(metadata)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{source} holds a damaged tokenizer: {error!r}") from error


def _read(metadata: Mapping[str, Any]) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise UserError(f"a GGUF tokenizer of kind {kind!r}: expected gpt2 or llama, with tokens")
    tokenizer = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    types = metadata.get("tokenizer.ggml.token_type") or []
    added = [
        (token, is_a)
        for token, is_a in zip(tokens, types, strict=False)
        if is_a in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([_added(token, True) for token, is_a in added if is_a == CONTROL])
    tokenizer.add_tokens([_added(token, False) for token, is_a in added if is_a == USER_DEFINED])
    first = []
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE
    if metadata.get("tokenizer.ggml.add_bos_token", begins):
        first = [_token(metadata, "bos")]
    if first:
        template = [*first, "$A"]
        ids = [(token, tokenizer.token_to_id(token)) for token in first]
        before = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = processors.Sequence(
            [*before, processors.TemplateProcessing(single=template, special_tokens=ids)]
        )
    return tokenizer


def _token(metadata: Mapping[str, Any], name: str, default: int | None = None) -> str:
    tokens, key = metadata["tokenizer.ggml.tokens"], f"tokenizer.ggml.{name}_token_id"
    number = metadata.get(key, default)
    if number not in range(len(tokens)):
        raise UserError(f"{key} is {number!r}: expected one of {len(tokens)} tokens")
    return tokens[number]


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise UserError(f"tokenizer.ggml.pre {pre!r} is not known; known: {', '.join(SPLITS)}")
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if lone := [merge for merge in merges if len(merge) == 1]:
        raise UserError(f"{lone[0][0]!r} is among the merges: expected two tokens and a space")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[pre] is None)
    steps = [byte_level]
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif SPLITS[pre] is not None:
        steps = [pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """Llama 2's and Gemma's vocabulary, whose merges follow from the tokens' scores."""
    gemma = metadata.get("general.architecture", "").startswith("gemma")
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if gemma:  # runs of spaces are written as such; merged in the order of the vocabulary
        tokens = [
            token if token.strip() or " " not in token else "▁" * len(token) for token in tokens
        ]
        scores = [-float(index) for index in range(len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=False):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ids = vocabulary[left], vocabulary[right]
                ranked.append((-score, -len(left), -len(right), ids, (left, right)))
    merges = [merge for *_, merge in sorted(ranked)]
    unknown = _token(metadata, "unknown", 0)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", not gemma)
    steps = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return tokenizer


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)
