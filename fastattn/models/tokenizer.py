"""Byte-level BPE tokenizers (GPT-2's and SmolLM's) from the vocabulary and merges that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# GGUF's token types that are written in text as they stand and never split: control and user-defined.
_CONTROL, _USER_DEFINED = 3, 4
# Ends of a turn or of a text, in the families that use this kind of vocabulary.
_END_NAMES = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>")


class Tokenizer:
    """Text ↔ token ids.

    ``bos_id`` and ``eos_id`` may be None; ``stop_ids`` are the ids that end a text or a chat turn.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos
        self.chat_template = chat_template
        ends = {eos_id, *(backend.token_to_id(name) for name in _END_NAMES)}
        self.stop_ids: tuple[int, ...] = tuple(sorted(i for i in ends if i is not None))

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``. Control tokens spelled out in it are ordinary text unless ``special``."""
        self.backend.encode_special_tokens = not special
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``; control tokens are left out unless ``special``. Undoes ``encode`` exactly."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation of ``{"role": …, "content": …}``, laid out by the file's own chat template.

        Raises ValueError where the file has no template, ImportError where ``jinja2`` is missing.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        # A template is code from the file: it runs in Jinja's sandbox.
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        spelled = {
            name: "" if token is None else self.backend.id_to_token(token)
            for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id))
        }
        text = environment.from_string(self.chat_template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **spelled
        )
        return self.encode(text, special=True)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata (``tokenizer.ggml.*``); ValueError for keys missing or a kind that is not supported."""
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise ValueError(f"the tokenizer model {model!r} is not supported ('gpt2', byte-level BPE, is)")
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        merges = [
            (left, right) for left, _, right in (m.partition(" ") for m in _strings(metadata, "tokenizer.ggml.merges"))
        ]
        if any(not left or not right or " " in right for left, right in merges):
            raise ValueError("tokenizer.ggml.merges has an entry that is not two tokens")
        kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
            raise ValueError("tokenizer.ggml.tokens repeats a token or does not fit tokenizer.ggml.token_type")
        special_ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")]
        if any(i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)) for i in special_ids):
            raise ValueError(f"tokenizer.ggml: the bos or eos token id is outside the vocabulary: {special_ids}")
        return cls(
            _byte_level_bpe(tokens, merges, kinds, metadata.get("tokenizer.ggml.pre", "gpt-2")),
            bos_id=special_ids[0],
            eos_id=special_ids[1],
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
            chat_template=metadata.get("tokenizer.chat_template"),
        )


def _byte_level_bpe(tokens: list[str], merges: list[tuple[str, str]], kinds: Sequence[int], pre: str) -> Any:
    try:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ImportError("tokenizers are built by the package 'tokenizers': pip install 'fastattn[models]'") from error

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splitters = {
        "gpt-2": byte_level,
        # SmolLM splits every digit off before the byte-level split.
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if pre not in splitters:
        raise ValueError(f"the pre-tokenizer {pre!r} is not supported ({', '.join(splitters)} are)")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    except Exception as error:  # the Rust side raises bare Exceptions
        raise ValueError(f"tokenizer.ggml: {error}") from error
    backend.pre_tokenizer = splitters[pre]
    backend.decoder = decoders.ByteLevel()
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in whole])
    return backend


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f"the metadata key {key!r} is missing or not a list of strings")
    return value
