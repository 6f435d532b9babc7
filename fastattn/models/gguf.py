"""GGUF files (llama.cpp's single-file format, versions 2 and 3) as a config, a state dict and a tokenizer.

A file is: magic, version, counts; key/value metadata; tensor names, shapes, types and offsets; then the aligned data. It is
read here with every length checked against the file's size, so that a truncated, damaged or foreign file gives a ValueError
that names the file and the place, before anything is allocated for it. The ``gguf`` package decodes the quantized weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.tokenizer import Tokenizer
from fastattn.models.transformer import Transformer, TransformerConfig

# GGUF's metadata value types: struct codes by number; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

#: Called with (tensors done, tensors in all) while they are decoded.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``shape`` outermost first as in torch, ``kind`` GGML's type number, offset and size in bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


class GGUFFile:
    """A parsed file: ``metadata`` (key → Python value), ``entries`` (tensor name → TensorEntry), ``tensor(name)``.

    Raises ValueError for a file that is not a whole, well-formed GGUF, ImportError where the ``gguf`` package is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._gguf = _package("gguf")
        with self.path.open("rb") as stream:
            empty = stream.seek(0, os.SEEK_END) == 0
            self._data = memoryview(b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        self._at = 0
        self._place = "the header"
        if bytes(self._data[:4]) != b"GGUF":
            raise self.error(f"not a GGUF file: it starts with {bytes(self._data[:4])!r} instead of b'GGUF'")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise self.error(f"GGUF version {version} is not supported (2 and 3 are)")
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        self.metadata = self._read_metadata(key_count)
        self.entries = self._read_entries(tensor_count)

    def error(self, message: str) -> ValueError:
        """A ValueError that names this file."""
        return ValueError(f"{self.path}: {message}")

    def required(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """``metadata[key]``, checked to be of ``kind``; ``default`` where it is absent."""
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(f"the metadata key {key!r} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"the metadata key {key!r} has the value {str(value)[:60]!r}, of the wrong type")
        return value

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor decoded to float32; ValueError where it is absent or not of this shape."""
        import numpy as np

        entry = self.entries.get(name)
        if entry is None:
            raise self.error(f"the tensor {name!r} is missing")
        if entry.shape != shape:
            raise self.error(f"the tensor {name!r} has the shape {entry.shape}, expected {shape}")
        kind = self._gguf.GGMLQuantizationType(entry.kind)
        raw = np.frombuffer(self._data, np.uint8, entry.nbytes, entry.offset)
        # Rows of blocks, or of float32/16 values: what the decoder expects.
        if kind.name in ("F32", "F16"):
            raw = raw.view(np.dtype(kind.name.replace("F", "float"))).reshape(shape)
        else:
            raw = raw.reshape(*shape[:-1], -1)
        try:
            decoded = self._gguf.quants.dequantize(raw, kind)
        except NotImplementedError as error:
            raise self.error(f"the tensor {name!r} has the type {kind.name}, which `gguf` cannot decode") from error
        return torch.from_numpy(np.array(decoded, dtype=np.float32).reshape(shape))

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self._at:
            raise self.error(f"truncated or damaged: {size} bytes expected at byte {self._at} ({self._place}), "
                             f"the file has {len(self._data)}")  # fmt: skip
        self._at += size
        return self._data[self._at - size : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        raw = bytes(self._take(self._scalar("Q")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"damaged: {self._place} is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self.error(f"damaged: {self._place} has the unknown type {kind}")
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            # A memoryview refuses a size that does not fit, before anything is allocated.
            raw = self._take(length * struct.calcsize("<" + _SCALARS[kind]))
            return list(struct.unpack(f"<{length}{_SCALARS[kind]}", raw))
        if kind != _STRING:
            raise self.error(f"{self._place} is an array of type {kind}: not supported")
        return [self._string() for _ in range(length)]

    def _read_metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(count):
            self._place = f"metadata key {number} of {count}"
            key = self._string()
            self._place = f"the metadata key {key!r}"
            if key in metadata:
                raise self.error(f"damaged: {self._place} occurs twice")
            metadata[key] = self._value(self._scalar("I"))
        return metadata

    def _read_entries(self, count: int) -> dict[str, TensorEntry]:
        sizes = {int(kind): size for kind, size in self._gguf.GGML_QUANT_SIZES.items()}
        alignment = self.required("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"damaged: the alignment {alignment} is not a power of two")
        relative: dict[str, TensorEntry] = {}
        for number in range(count):
            self._place = f"tensor {number} of {count}"
            name = self._string()
            dims = self._scalar("I")
            if name in relative or not 1 <= dims <= 4:
                raise self.error(f"damaged: the tensor {name!r} occurs twice or has {dims} dimensions")
            shape = tuple(reversed([self._scalar("Q") for _ in range(dims)]))
            kind = self._scalar("I")
            if kind not in sizes:
                raise self.error(f"the tensor {name!r} has the unknown type {kind}")
            block, block_bytes = sizes[kind]
            if shape[-1] % block:
                raise self.error(f"damaged: rows of {shape[-1]} in tensor {name!r} are not whole blocks of {block}")
            relative[name] = TensorEntry(shape, kind, self._scalar("Q"), math.prod(shape) // block * block_bytes)
        start = -(-self._at // alignment) * alignment
        entries = {
            name: TensorEntry(entry.shape, entry.kind, start + entry.offset, entry.nbytes)
            for name, entry in relative.items()
        }
        for name, entry in entries.items():
            if entry.offset + entry.nbytes > len(self._data):
                raise self.error(f"truncated: the tensor {name!r} ends at byte {entry.offset + entry.nbytes}, "
                                 f"the file has {len(self._data)}")  # fmt: skip
        return entries


def config_from_gguf(file: GGUFFile, implementation: str = "auto") -> TransformerConfig:
    """The architecture of a Llama-family file; ValueError for any other, or for features this model does not have."""
    architecture = file.required("general.architecture", str)
    if architecture != "llama":
        raise file.error(f"the architecture {architecture!r} is not supported ('llama' is)")
    if file.metadata.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.entries:
        raise file.error("scaled rotary frequencies are not supported")
    if file.metadata.get("llama.expert_count"):
        raise file.error("mixtures of experts are not supported")
    nheads = file.required("llama.attention.head_count", int)
    head_dim = file.metadata.get("llama.attention.key_length", 0)
    if file.metadata.get("llama.attention.value_length", head_dim) != head_dim:
        raise file.error("keys and values of different head_dim are not supported")
    embedding = file.entries.get("token_embd.weight")
    if embedding is None:
        raise file.error("the tensor 'token_embd.weight' is missing")
    try:
        return TransformerConfig(
            vocab_size=embedding.shape[0],
            dim=file.required("llama.embedding_length", int),
            nlayers=file.required("llama.block_count", int),
            nheads=nheads,
            nheads_kv=file.required("llama.attention.head_count_kv", int, nheads),
            head_dim=head_dim,
            ffn_dim=file.required("llama.feed_forward_length", int),
            max_seq_len=file.required("llama.context_length", int),
            norm_eps=file.required("llama.attention.layer_norm_rms_epsilon", float),
            rope_theta=file.required("llama.rope.freq_base", float, 10000.0),
            rope_dim=file.metadata.get("llama.rope.dimension_count", 0),
            # Converters permute the rows of Wq and Wk from rotating halves to rotating neighbours; they are used as stored.
            rope_interleaved=True,
            qkv_bias="blk.0.attn_q.bias" in file.entries,
            out_bias="blk.0.attn_output.bias" in file.entries,
            tie_embeddings="output.weight" not in file.entries,
            implementation=implementation,
        )
    except (ValueError, TypeError) as error:
        raise error if str(file.path) in str(error) else file.error(str(error)) from error


def state_dict_from_gguf(
    file: GGUFFile, config: TransformerConfig, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> dict[str, Tensor]:
    """The weights under ``Transformer``'s names, decoded and cast to ``dtype``; q, k and v become one matrix.

    Raises ValueError for a tensor that is missing, misshapen, or that this architecture has no place for.
    """
    dim, ffn_dim = config.dim, config.ffn_dim
    q_rows, kv_rows = config.nheads * config.head_dim, config.nheads_kv * config.head_dim
    # name here → [(name in the file, shape)], concatenated along the rows
    plan: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "embedding.weight": [("token_embd.weight", (config.vocab_size, dim))],
        "norm.weight": [("output_norm.weight", (dim,))],
    }
    if not config.tie_embeddings:
        plan["lm_head.weight"] = [("output.weight", (config.vocab_size, dim))]
    if config.nlayers > len(file.entries):
        raise file.error(f"{config.nlayers} layers are announced, but there are only {len(file.entries)} tensors")
    for layer in range(config.nlayers):
        here, there = f"blocks.{layer}.", f"blk.{layer}."
        qkv_rows = (("attn_q", q_rows), ("attn_k", kv_rows), ("attn_v", kv_rows))
        plan[here + "attention_norm.weight"] = [(there + "attn_norm.weight", (dim,))]
        plan[here + "attention.qkv.weight"] = [(f"{there}{name}.weight", (rows, dim)) for name, rows in qkv_rows]
        plan[here + "attention.out.weight"] = [(there + "attn_output.weight", (dim, q_rows))]
        if config.qkv_bias:
            plan[here + "attention.qkv.bias"] = [(f"{there}{name}.bias", (rows,)) for name, rows in qkv_rows]
        if config.out_bias:
            plan[here + "attention.out.bias"] = [(there + "attn_output.bias", (dim,))]
        plan[here + "ffn_norm.weight"] = [(there + "ffn_norm.weight", (dim,))]
        plan[here + "ffn.gate.weight"] = [(there + "ffn_gate.weight", (ffn_dim, dim))]
        plan[here + "ffn.up.weight"] = [(there + "ffn_up.weight", (ffn_dim, dim))]
        plan[here + "ffn.down.weight"] = [(there + "ffn_down.weight", (dim, ffn_dim))]
    unknown = sorted(set(file.entries) - {name for parts in plan.values() for name, _ in parts})
    if unknown:
        raise file.error(f"{len(unknown)} tensors have no place in this model, the first is {unknown[0]!r}")

    state: dict[str, Tensor] = {}
    for name, parts in plan.items():
        tensors = [file.tensor(*part).to(dtype) for part in parts]
        state[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if progress is not None:
            progress(len(state), len(plan))
    return state


def from_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
    progress: Progress | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Load a Llama-family GGUF file (SmolLM2, TinyLlama, Llama 2, …) into a ``Transformer`` in eval mode, and its tokenizer.

    Args:
        path: the file; quantized weights are decoded to ``dtype``.
        implementation: which implementation the model's operations use.
        progress: called as ``progress(tensors_done, tensors_in_all)``.

    Raises:
        ValueError: naming the file, for one that is truncated, damaged, not GGUF, or of an architecture, rotary scaling or
            tokenizer that is not supported.
        ImportError: where the packages ``gguf`` or ``tokenizers`` are missing.
    """
    file = GGUFFile(path)
    config = config_from_gguf(file, implementation)
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    except ValueError as error:
        raise file.error(str(error)) from error
    state = state_dict_from_gguf(file, config, dtype, progress)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    return model.eval(), tokenizer


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading GGUF files needs the package {name!r}: pip install 'fastattn[models]'") from error
